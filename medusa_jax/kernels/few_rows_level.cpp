// The arithmetic of few_rows.cpp for a single instruction set, which LEVEL names.

#include <algorithm>
#include <type_traits>

#include "few_rows.h"
#include "levels.h"
#include "vectors.h"

namespace {
typedef int16_t Shorts __attribute__((vector_size(kBytes)));
typedef int16_t HalfShorts __attribute__((vector_size(kBytes / 2)));
typedef int8_t Bytes __attribute__((vector_size(kBytes / 2)));

// Integers of 16 bits that are multiplied.
inline Shorts numbers(const int16_t* w) { return load<Shorts>(w); }
inline Shorts numbers(const int8_t* w) {
#if defined(__AVX512F__)
  return (Shorts)_mm512_cvtepi8_epi16(load<__m256i>(w));
#elif defined(__AVX2__)
  return (Shorts)_mm256_cvtepi8_epi16(load<__m128i>(w));
#endif
  return __builtin_convertvector(load<Bytes>(w), Shorts);
}

struct Nibbles {  // numbers 2i and 2i + 1 of an output
  uint8_t pair;
};
// The numbers of a vector's bytes, even ones first.
inline void pairs(const int8_t* w, Shorts (&to)[1]) { to[0] = numbers(w); }
inline void pairs(const Nibbles* w, Shorts (&to)[2]) {
  Shorts bytes = numbers(reinterpret_cast<const int8_t*>(w));
  to[0] = bytes << 12 >> 12;
  to[1] = bytes >> 4;
}

inline Vector add(Vector sum, Vector x, Vector w) { return sum + x * w; }
// Each lane takes two products. Which two depends on the instruction set; their sum is exact.
inline Ints add(Ints sum, Shorts x, Shorts w) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(__AVX512F__)
  return sum + (Ints)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif defined(__AVX2__)
  return sum + (Ints)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(__SSE2__)
  return sum + (Ints)_mm_madd_epi16((__m128i)x, (__m128i)w);
#endif
  HalfShorts xs[2], ws[2];
  memcpy(xs, &x, sizeof x);
  memcpy(ws, &w, sizeof w);
  for (int half = 0; half < 2; half++)
    sum += __builtin_convertvector(xs[half], Ints) * __builtin_convertvector(ws[half], Ints);
  return sum;
}

// What belongs to a type of weight: the rows' type, and how products are added up. Rows are cut
// into slices that stay in the first cache, at the same numbers however many rows there are.
template <class W>
struct Kind {
  typedef float X, Total;
  typedef Vector Sum;
  static constexpr long kLanes = kBytes / 4, kSlice = 6144 / kMostRows;
};
template <>
struct Kind<int8_t> {
  typedef int16_t X;
  typedef int64_t Total;
  typedef Ints Sum;
  // An int32 adds up a quarter of a slice at most: 384 products below 2^22.
  static constexpr long kLanes = kBytes / 2, kSlice = 1536;
};

// Calls take(i, the sum of all lanes of vector i) for all of N vectors.
#if defined(__AVX512F__)
template <class V>
inline V halves(V a, V b) {  // of two vectors side by side, added: 8 lanes of a, 8 of b
  __m512i x = (__m512i)a, y = (__m512i)b;
  return (V)_mm512_shuffle_i64x2(x, y, 0x44) + (V)_mm512_shuffle_i64x2(x, y, 0xee);
}
template <class V>
inline V quarters(V a, V b) {  // 4 lanes of each of 4 vectors
  __m512i x = (__m512i)a, y = (__m512i)b;
  return (V)_mm512_shuffle_i64x2(x, y, 0x88) + (V)_mm512_shuffle_i64x2(x, y, 0xdd);
}
inline __m512i wide(Ints x) {  // sums of two neighbors as int64
  __m512i low = _mm512_slli_epi64((__m512i)x, 32);
  return _mm512_add_epi64(_mm512_srai_epi64(low, 32), _mm512_srai_epi64((__m512i)x, 32));
}
inline void last_sums(Ints a, Ints b, int64_t (&sums)[8]) {  // [4 vectors, 4 lanes] twice
  __m512i x = wide(a), y = wide(b);
  x = _mm512_add_epi64(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
  memcpy(sums, &x, sizeof sums);
}
inline void last_sums(Vector a, Vector b, float (&sums)[8]) {
  __m512d x = (__m512d)a, y = (__m512d)b;
  Vector pairs = (Vector)_mm512_unpacklo_pd(x, y) + (Vector)_mm512_unpackhi_pd(x, y);
  for (int i = 0; i < 8; i++) sums[i] = pairs[2 * i] + pairs[2 * i + 1];
}
template <class Total, class V, int N, class Take>
inline void add_up(const V* v, Take take) {
#pragma GCC unroll 8
  for (int n = 0; n < N; n += 8) {
    V x[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) x[i] = n + i < N ? v[n + i] : V{};
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) x[i] = halves(x[2 * i], x[2 * i + 1]);
    x[0] = quarters(x[0], x[1]), x[1] = quarters(x[2], x[3]);
    Total sums[8];
    last_sums(x[0], x[1], sums);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
      if (n + i < N) take(n + i, sums[i % 4 * 2 + i / 4]);
  }
}
#else
template <class Total, class V, int N, class Take>
inline void add_up(const V* v, Take take) {
#pragma GCC unroll 32
  for (int n = 0; n < N; n++) {
    decltype(v[0][0] + 0) lanes[kBytes / 4];
    memcpy(lanes, &v[n], sizeof lanes);
    Total sum = 0;
    for (auto lane : lanes) sum += lane;
    take(n, sum);
  }
}
#endif

constexpr int kGroup = 24;         // outputs; each number of outputs of a tile divides it
constexpr long kAhead = 12 << 10;  // bytes to fetch ahead: far enough for memory, near enough for L1

// Adds the products of R rows and O outputs, whose sums stay in registers meanwhile. What it fetches
// ahead are the same numbers of outputs further on, which the next tiles read.
template <class W, int R, int O, class X, class Total>
void tile(const W* w, long w_stride, const X* x, long x_stride, long count, Total (*totals)[kGroup]) {
  typedef typename Kind<W>::Sum Sum;
  const long ahead = (kAhead / (count * long(sizeof(W))) + 1) * w_stride;
  Sum sums[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) sums[r][o] = Sum{};
  for (long i = 0; i < count; i += Kind<W>::kLanes) {
    decltype(numbers(w)) weights[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) {
      weights[o] = numbers(w + o * w_stride + i);
      __builtin_prefetch(w + o * w_stride + i + ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      auto mine = numbers(x + r * x_stride + i);
#if defined(__x86_64__)
      asm("" : "+v"(mine));  // in a register: GCC would read it again for each output
#endif
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) sums[r][o] = add(sums[r][o], mine, weights[o]);
    }
  }
  add_up<Total, Sum, R * O>(&sums[0][0], [&](int i, auto sum) { totals[i / O][i % O] += sum; });
}

// The tiles of a group of outputs, for some of the numbers.
template <class W, int R, class X, class Total>
void tiles(const W* w, long w_stride, const X* x, long x_stride, long count, int outputs,
           Total (&totals)[R][kGroup]) {
  constexpr int kFit = (kRegisters - 1) / (R + 1);
  constexpr int O = kFit >= 8 ? 8 : kFit >= 6 ? 6 : kFit >= 4 ? 4 : 3;
  int o = 0;
  for (; o + O <= outputs; o += O)
    tile<W, R, O>(w + o * w_stride, w_stride, x, x_stride, count, (Total(*)[kGroup]) & totals[0][o]);
  for (; o < outputs; o++)
    tile<W, R, 1>(w + o * w_stride, w_stride, x, x_stride, count, (Total(*)[kGroup]) & totals[0][o]);
}

// A group of outputs and R rows, slice by slice, so that the rows' slices stay in the first cache.
template <class W, int R>
void group(const Product& p, long row, long out, int outputs) {
  typedef typename Kind<W>::X X;
  constexpr long kLanes = Kind<W>::kLanes, kStep = Kind<W>::kSlice;
  typename Kind<W>::Total totals[R][kGroup] = {};
  auto* w = static_cast<const W*>(p.weight) + out * p.in;
  auto* x = static_cast<const X*>(p.x) + row * p.x_stride;
  long whole = p.in / kLanes * kLanes, rest = p.in - whole;
  for (long i = 0; i < whole; i += kStep)
    tiles<W, R>(w + i, p.in, x + i, p.x_stride, std::min(kStep, whole - i), outputs, totals);
  if (rest) {  // fewer numbers than there are lanes, then zeros
    W last_w[kGroup][kLanes] = {};
    X last_x[R][kLanes] = {};
    for (int o = 0; o < outputs; o++) memcpy(last_w[o], w + o * p.in + whole, rest * sizeof(W));
    for (int r = 0; r < R; r++) memcpy(last_x[r], x + r * p.x_stride + whole, rest * sizeof(X));
    tiles<W, R>(last_w[0], kLanes, last_x[0], kLanes, kLanes, outputs, totals);
  }
  for (int r = 0; r < R; r++) {
    float factor = p.x_scale ? p.x_scale[row + r] : 1, *y = p.y + p.places[row + r] * p.y_stride + out;
    for (int o = 0; o < outputs; o++)
      y[o] = float(totals[r][o]) * factor * (p.scale ? p.scale[out + o] : 1);
  }
}

constexpr int kMostScaled = kRegisters < 32 ? 2 : 6;  // more rows would leave the registers

// Adds the products of R rows and O outputs. Integers of a group are added up exactly; then each lane
// is multiplied by the group's scale.
template <class W, int R, int O>
void scaled_tile(const Product& p, const W* w, const int16_t* x, const float* scale, long count,
                 float (*totals)[kGroup]) {
  constexpr int kPer = std::is_same_v<W, Nibbles> ? 2 : 1;
  constexpr long kLanes = kBytes / 2;
  const long stride = p.in / kPer, group = stride / p.groups, ahead = (kAhead / count + 1) * stride;
  Vector sums[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) sums[r][o] = Vector{};
  for (long i = 0; i < count; scale++) {
    Ints parts[R][O];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) parts[r][o] = Ints{};
    for (long end = i + group; i < end; i += kLanes) {
      Shorts weights[O][kPer];
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) {
        pairs(w + o * stride + i, weights[o]);
        __builtin_prefetch(w + o * stride + i + ahead);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int half = 0; half < kPer; half++) {
          Shorts mine = numbers(x + r * p.x_stride + half * stride + i);
#pragma GCC unroll 8
          for (int o = 0; o < O; o++) parts[r][o] = add(parts[r][o], mine, weights[o][half]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int o = 0; o < O; o++)
        sums[r][o] += __builtin_convertvector(parts[r][o], Vector) * scale[o * p.groups];
  }
  add_up<float, Vector, R * O>(&sums[0][0], [&](int i, float sum) { totals[i / O][i % O] += sum; });
}

// `group` for weights whose outputs have several scales.
template <class W, int R>
void scaled_group(const Product& p, long row, long out, int outputs) {
  constexpr int O = kRegisters < 32 ? (R == 1 ? 4 : 2) : R == 1 ? 6 : R <= 4 ? 4 : 3;
  constexpr long kPer = std::is_same_v<W, Nibbles> ? 2 : 1;
  float totals[R][kGroup] = {};
  const long stride = p.in / kPer, group = stride / p.groups;
  const long step = std::max(group, Kind<int8_t>::kSlice / kPer / group * group);
  auto* x = static_cast<const int16_t*>(p.x) + row * p.x_stride;
  auto* w = static_cast<const W*>(p.weight) + out * stride;
  for (long i = 0; i < stride; i += step) {
    const float* scale = p.scale + out * p.groups + i / group;
    long count = std::min(step, stride - i);
    int o = 0;
    for (; o + O <= outputs; o += O)
      scaled_tile<W, R, O>(p, w + o * stride + i, x + i, scale + o * p.groups, count,
                           (float(*)[kGroup]) & totals[0][o]);
    for (; o < outputs; o++)
      scaled_tile<W, R, 1>(p, w + o * stride + i, x + i, scale + o * p.groups, count,
                           (float(*)[kGroup]) & totals[0][o]);
  }
  for (int r = 0; r < R; r++) {
    float* y = p.y + p.places[row + r] * p.y_stride + out;
    for (int o = 0; o < outputs; o++) y[o] = totals[r][o] * p.x_scale[row + r];
  }
}

template <class W, int R = kMostRows>
void rows(const Product& p, long row, long count, long out, int outputs) {
  if constexpr (std::is_same_v<W, Nibbles>) {
    if (count == R) return scaled_group<W, R>(p, row, out, outputs);
  } else if (count == R) {
    if constexpr (std::is_same_v<W, int8_t>)
      if (p.groups) return scaled_group<W, R>(p, row, out, outputs);
    return group<W, R>(p, row, out, outputs);
  }
  if constexpr (R > 1) rows<W, R - 1>(p, row, count, out, outputs);
}

template <class W>
void product(const Product& p) {
  const long most = p.groups ? kMostScaled : kMostRows;
  long passes = (p.rows + most - 1) / most;
  for (long out = p.begin; out < p.end; out += kGroup) {
    int outputs = p.end - out < kGroup ? p.end - out : kGroup;
    for (long pass = 0; pass < passes; pass++) {  // of nearly as many rows each
      long row = pass * p.rows / passes;
      rows<W>(p, row, (pass + 1) * p.rows / passes - row, out, outputs);
    }
  }
}
}  // namespace

extern "C" void OF_LEVEL(few_rows)(const Product& p) {
  if (p.type == 0) product<float>(p);
  if (p.type == 1) product<uint16_t>(p);
  if (p.type == 2) product<int8_t>(p);
  if (p.type == 3) product<Nibbles>(p);
}

// A row as integers of 16 bits, and the power of two that they are multiplied by, which is
// returned: rounding moves no number by more than 2^-15 of the largest. A power of two, so that
// all instruction sets round alike. A row that is not finite has a factor that is not finite.
extern "C" float OF_LEVEL(round_row)(const float* x, long count, int16_t* rounded) {
  int32_t largest = 0;
  for (long i = 0; i < count; i++) {
    int32_t bits = load<int32_t>(x + i) & 0x7fffffff;  // as integers, floats >= 0 keep their order
    largest = bits > largest ? bits : largest;
  }
  int32_t exponent = largest >> 23;  // biased by 127: the largest is in [2^e, 2^(e + 1))
  if (exponent < 32) exponent = 32;  // 2^-95: smaller numbers are zero beside any weight
  int32_t factor_bits = (exponent - 14) << 23, inverse_bits = (254 + 14 - exponent) << 23;
  float factor = load<float>(&factor_bits), inverse = load<float>(&inverse_bits);
  const float magic = 12582912;  // 1.5 * 2^23: a float of this size has no digits below 1
  for (long i = 0; i < count; i++) {
    float shifted = x[i] * inverse + magic;
    int32_t number = load<int32_t>(&shifted) - load<int32_t>(&magic);
    rounded[i] = number < 32767 ? number : 32767;
  }
  return exponent < 255 ? factor : load<float>(&largest);
}
