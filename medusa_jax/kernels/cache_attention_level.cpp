// The arithmetic of cache_attention.cpp for a single instruction set, which LEVEL names.

#include <algorithm>
#include <limits>

#include "cache_attention.h"
#include "levels.h"
#include "vectors.h"

namespace {
constexpr int kLanes = kBytes / 4, kSlots = 128;  // of a block of scores
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Block {
  alignas(64) float scores[kMostQueries][kSlots];  // then their weights
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

// The same for `outputs` columns of w, of which the last vector may be cut short.
template <class W, int R>
void columns(const float* x, long x_stride, const W* w, long stride, long count, long outputs,
             float* sums, long sums_stride) {
  constexpr int kFit = (kRegisters - 1) / (R + 1), O = kFit >= 8 ? 8 : kFit >= 4 ? 4 : 2;
  long o = 0;
  for (; o + O * kLanes <= outputs; o += O * kLanes)
    tile<W, R, O>(x, x_stride, w + o, stride, count, sums + o, sums_stride);
  for (; o + kLanes <= outputs; o += kLanes)
    tile<W, R, 1>(x, x_stride, w + o, stride, count, sums + o, sums_stride);
  if (o == outputs) return;
  W rest[kMostWidth][kLanes];
  for (long i = 0; i < count; i++) {
    memset(rest[i], 0, sizeof rest[i]);
    memcpy(rest[i], w + i * stride + o, (outputs - o) * sizeof(W));
  }
  tile<W, R, 1>(x, x_stride, rest[0], kLanes, count, sums + o, sums_stride);
}

template <class W, int R = kMostRows>
void product(long rows, const float* x, long x_stride, const W* w, long stride, long count,
             long outputs, float* sums, long sums_stride) {
  for (; rows >= R; rows -= R, x += R * x_stride, sums += R * sums_stride)
    columns<W, R>(x, x_stride, w, stride, count, outputs, sums, sums_stride);
  if constexpr (R > 1)
    if (rows) product<W, R - 1>(rows, x, x_stride, w, stride, count, outputs, sums, sums_stride);
}

// Scores to weights e^(score - top); what was mixed before is scaled to the new top.
void weigh(Block& block, int query, long count, long width) {
  float* scores = block.scores[query];
  for (long i = count; i % kLanes; i++) scores[i] = kNothing;
  Vector most = Vector{} + kLowest;
  for (long i = 0; i < count; i += kLanes) {
    Vector score = load<Vector>(scores + i);
    most = score > most ? score : most;
  }
  float top = block.top[query];
  for (int lane = 0; lane < kLanes; lane++) top = std::max(top, most[lane]);
  Vector sums = {};
  for (long i = 0; i < count; i += kLanes) {
    Vector weight = exponential(load<Vector>(scores + i) - top);
    memcpy(scores + i, &weight, kBytes);
    sums += weight;
  }
  float factor = exponential(Vector{} + (block.top[query] - top))[0], total = 0;
  for (int lane = 0; lane < kLanes; lane++) total += sums[lane];
  block.total[query] = block.total[query] * factor + total;
  block.top[query] = top;
  if (factor != 1)
    for (long c = 0; c < width; c++) block.mixed[query][c] *= factor;
}

// Adds slots [start, start + count) of what some queries may see.
template <class W, class Hide>
void add_slots(Block& block, const Queries& q, const Seen& seen, long start, long count, Hide hide) {
  long rows = q.end - q.begin;
  memset(block.scores, 0, rows * sizeof block.scores[0]);
  auto* keys = static_cast<const W*>(seen.keys) + start;
  auto* values = static_cast<const W*>(seen.values) + start * q.width;
  product<W>(rows, q.queries + q.begin * q.width, q.width, keys, seen.stride, q.width, count,
             block.scores[0], kSlots);
  for (long i = 0; i < rows; i++) {
    hide((q.begin + i) % q.tokens, block.scores[i]);
    weigh(block, i, count, q.width);
  }
  product<W>(rows, block.scores[0], kSlots, values, q.width, count, q.width, block.mixed[0],
             kMostWidth + kLanes);
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
  for (long start = std::max(0L, from) / kSlots * kSlots; start < q.cache.count; start += kSlots) {
    long count = std::min<long>(kSlots, q.cache.count - start);
    add_slots<W>(block, q, q.cache, start, count, [&](long token, float* scores) {
      if (q.first) std::fill_n(scores, std::clamp(q.first[token] - start, 0L, count), kNothing);
    });
  }
  for (long start = 0; start < q.own.count; start += kSlots) {
    long count = std::min<long>(kSlots, q.own.count - start);
    add_slots<W>(block, q, q.own, start, count, [&](long token, float* scores) {
      const bool* mask = q.mask + token * q.own.count + start;
      for (long i = 0; i < count; i++)
        if (!mask[i]) scores[i] = kNothing;
    });
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
