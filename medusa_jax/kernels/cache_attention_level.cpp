// The arithmetic of cache_attention.cpp for a single instruction set, which LEVEL names.

#include <algorithm>
#include <limits>

#include "cache_attention.h"
#include "levels.h"
#include "vectors.h"

namespace {
constexpr int kLanes = kBytes / 4, kSlots = 128, kColumns = 2 * kSlots;  // of a block of scores
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Block {
  alignas(64) float scores[kMostQueries][kColumns];  // then their weights
  alignas(64) float mixed[kMostQueries][kMostWidth + kLanes];
  float top[kMostQueries], total[kMostQueries];
};

// e^x for x <= 0, to 2e-7 of itself; 0 below -87. A NaN stays a NaN.
inline Vector exponential(Vector x) {
  const float magic = 12582912;  // 1.5 * 2^23: a float of this size has no digits below 1
  Vector shifted = x * 1.44269504f + magic, n = shifted - magic;
  Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  Vector y = r * (1 / 5040.f) + 1 / 720.f;
  y = y * r + 1 / 120.f, y = y * r + 1 / 24.f, y = y * r + 1 / 6.f;
  y = y * r + .5f, y = y * r + 1.f, y = y * r + 1.f;
  Ints power = ((Ints)shifted - 0x4b400000 + 127) << 23;
  Ints far = x < -87.f;
  return (Vector)((Ints)(y * (Vector)power) & ~far);
}

inline float largest(Vector x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#endif
  float top = x[0];
  for (int lane = 1; lane < kLanes; lane++) top = std::max(top, x[lane]);
  return top;
}
inline float total(Vector x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += x[lane];
  return sum;
}

// sums[r][o] += x[r][i] w[i][o], o being a vector of numbers, over `count` rows of w.
template <class W, int R, int O>
inline void tile(const float* x, long x_stride, const W* w, long stride, long count, float* sums,
                 long sums_stride) {
  Vector total[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) total[r][o] = load<Vector>(sums + r * sums_stride + o * kLanes);
  for (long i = 0; i < count; i++) {
    Vector row[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) row[o] = numbers(w + i * stride + o * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      float number = x[r * x_stride + i];
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) total[r][o] = total[r][o] + row[o] * number;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) memcpy(sums + r * sums_stride + o * kLanes, &total[r][o], kBytes);
}

// The same for `outputs` columns of w. `rest` holds those that do not fill a vector, then zeros.
template <class W, int R>
void columns(const float* x, long x_stride, const W* w, long stride, long count, long outputs,
             const W* rest, float* sums, long sums_stride) {
  constexpr int kFit = (kRegisters - 1) / (R + 1), O = kFit >= 8 ? 8 : kFit >= 4 ? 4 : 2;
  long o = 0;
  for (; o + O * kLanes <= outputs; o += O * kLanes)
    tile<W, R, O>(x, x_stride, w + o, stride, count, sums + o, sums_stride);
  for (; o + kLanes <= outputs; o += kLanes)
    tile<W, R, 1>(x, x_stride, w + o, stride, count, sums + o, sums_stride);
  if (o < outputs) tile<W, R, 1>(x, x_stride, rest, kLanes, count, sums + o, sums_stride);
}

template <class W, int R = kMostRows>
void rows_of(long rows, const float* x, long x_stride, const W* w, long stride, long count,
             long outputs, const W* rest, float* sums, long sums_stride) {
  for (; rows >= R; rows -= R, x += R * x_stride, sums += R * sums_stride)
    columns<W, R>(x, x_stride, w, stride, count, outputs, rest, sums, sums_stride);
  if constexpr (R > 1)
    if (rows)
      rows_of<W, R - 1>(rows, x, x_stride, w, stride, count, outputs, rest, sums, sums_stride);
}

template <class W>
void product(long rows, const float* x, long x_stride, const W* w, long stride, long count,
             long outputs, float* sums, long sums_stride) {
  W rest[kMostWidth][kLanes];
  if (long last = outputs % kLanes)
    for (long i = 0; i < count; i++)
      for (long o = 0; o < kLanes; o++)
        rest[i][o] = o < last ? w[i * stride + outputs - last + o] : W();
  rows_of<W>(rows, x, x_stride, w, stride, count, outputs, rest[0], sums, sums_stride);
}

// Scores to weights e^(score - top); what was mixed before is scaled to the new top.
void weigh(Block& block, int query, long count, long width) {
  float* scores = block.scores[query];
  Vector most = Vector{} + kLowest;
  for (long i = 0; i < count; i += kLanes) {
    Vector score = load<Vector>(scores + i);
    most = score > most ? score : most;
  }
  float top = std::max(block.top[query], largest(most));
  Vector sums = {};
  for (long i = 0; i < count; i += kLanes) {
    Vector weight = exponential(load<Vector>(scores + i) - top);
    memcpy(scores + i, &weight, kBytes);
    sums += weight;
  }
  float factor = exponential(Vector{} + (block.top[query] - top))[0];
  block.total[query] = block.total[query] * factor + total(sums);
  block.top[query] = top;
  if (factor != 1)
    for (long c = 0; c < width; c++) block.mixed[query][c] *= factor;
}

// Some slots of the cache, or some tokens of the block itself.
struct Span {
  long start, count;
  long whole() const { return (count + kLanes - 1) / kLanes * kLanes; }  // in whole vectors
};

// Asks memory for all at once, which the strides of rows would hide from the processor.
inline void fetch(const void* row, long bytes) {
  for (long i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, 2);
}

// Scores of some queries, in the columns of the block from `column` on.
template <class W>
void score(Block& block, const Queries& q, const Seen& seen, Span span, long column) {
  auto* keys = static_cast<const W*>(seen.keys) + span.start;
  auto* values = static_cast<const W*>(seen.values) + span.start * q.width;
  for (long c = 0; c < q.width; c++) fetch(keys + c * seen.stride, span.count * sizeof(W));
  fetch(values, span.count * q.width * sizeof(W));
  // Where a row of keys goes on, in whole vectors: the scores of what is behind will be hidden.
  long count = std::min(span.whole(), seen.stride - span.start);
  product<W>(q.end - q.begin, q.queries + q.begin * q.width, q.width, keys, seen.stride, q.width,
             count, block.scores[0] + column, kColumns);
}

// Adds to what is mixed the values of some slots, by the weights in those columns.
template <class W>
void mix(Block& block, const Queries& q, const Seen& seen, Span span, long column) {
  auto* values = static_cast<const W*>(seen.values) + span.start * q.width;
  product<W>(q.end - q.begin, block.scores[0] + column, kColumns, values, q.width, span.count,
             q.width, block.mixed[0], kMostWidth + kLanes);
}

// Adds some slots of the cache and some tokens of the block that queries may see.
template <class W>
void add(Block& block, const Queries& q, Span cached, Span own) {
  long rows = q.end - q.begin, behind = cached.whole(), all = behind + own.whole();
  for (long i = 0; i < rows; i++) memset(block.scores[i], 0, all * sizeof(float));
  score<W>(block, q, q.cache, cached, 0);
  score<W>(block, q, q.own, own, behind);
  for (long i = 0; i < rows; i++) {
    long token = (q.begin + i) % q.tokens;
    float *scores = block.scores[i], *others = scores + behind;
    if (q.first)
      std::fill_n(scores, std::clamp(q.first[token] - cached.start, 0L, cached.count), kNothing);
    std::fill(scores + cached.count, others, kNothing);
    const bool* mask = q.mask + token * q.own.count + own.start;
    for (long o = 0; o < own.count; o++)
      if (!mask[o]) others[o] = kNothing;
    std::fill(others + own.count, scores + all, kNothing);
    weigh(block, i, all, q.width);
  }
  mix<W>(block, q, q.cache, cached, 0);
  mix<W>(block, q, q.own, own, behind);
}

template <class W>
void attend(const Queries& q) {
  Block block;
  long rows = q.end - q.begin, from = q.first ? q.cache.count : 0;
  for (long i = 0; i < rows; i++) {
    block.top[i] = kLowest, block.total[i] = 0;
    std::fill_n(block.mixed[i], q.width + kLanes, 0.f);
    if (q.first) from = std::min<long>(from, q.first[(q.begin + i) % q.tokens]);
  }
  // Blocks begin at the same slots whatever the queries: so the sums are the same to the last bit.
  long start = std::max(0L, from) / kSlots * kSlots, seen = 0;
  for (; start + kSlots < q.cache.count; start += kSlots) add<W>(block, q, {start, kSlots}, {0, 0});
  for (; seen == 0 || seen < q.own.count; seen += kSlots) {  // the last slots with the first tokens
    Span cached{start, seen ? 0 : std::max(0L, q.cache.count - start)};
    add<W>(block, q, cached, {seen, std::min<long>(kSlots, q.own.count - seen)});
  }
  for (long i = 0; i < rows; i++) {
    float* out = q.out + (q.begin + i) * q.width;
    float factor = block.total[i] == 0 ? 0 : 1 / block.total[i];  // of nothing: zeros
    for (long c = 0; c < q.width; c++) out[c] = block.mixed[i][c] * factor;
  }
}
}  // namespace

extern "C" void OF_LEVEL(cache_attention)(const Queries& q) {
  if (q.type == 0) attend<float>(q);
  if (q.type == 1) attend<uint16_t>(q);
}
