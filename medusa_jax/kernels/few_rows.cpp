// Products of few rows: y[r, m, o] = scale[m, o] * sum_i x[r, m, i] W[m, o, i].
//
// A decode step multiplies 1 to 32 rows by each weight, so it should take the time of reading
// the weight. Each block of outputs is read from memory once and meets all rows while it is in
// registers or in the first cache. The file is compiled several times: with LEVEL defined, it is
// the arithmetic for one instruction set; without it, the entry that XLA calls, which asks the
// processor for the widest of them.

#include <cstdint>
#include <cstring>

// What all instruction sets compute: outputs [begin, end) of a single weight for R rows.
struct Product {
  const void* weight;  // [out, in]
  const float* scale;  // [out], or null
  const float* x;      // R rows of `stride` floats, a multiple of 16; zeros after `in`
  float* y;            // R rows of `y_stride`
  long rows, in, stride, y_stride, begin, end;
  int type;  // of the weight: 0 float32, 1 bfloat16, 2 int8
};

#ifdef LEVEL
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define JOIN(a, b) a##b
#define NAME(level) JOIN(few_rows_, level)

namespace {
#if defined(__AVX512F__)
constexpr int kBytes = 64, kMostRows = 6, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kBytes = 32, kMostRows = 4, kRegisters = 16;
#else
constexpr int kBytes = 16, kMostRows = 4, kRegisters = 16;
#endif
constexpr int kLanes = kBytes / 4;
typedef float Vector __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
typedef int8_t Bytes __attribute__((vector_size(kBytes / 4)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));

template <class T>
inline T load(const void* from) {
  T value;
  memcpy(&value, from, sizeof(T));
  return value;
}
inline Vector numbers(const float* w) { return load<Vector>(w); }
inline Vector numbers(const uint16_t* w) {  // bfloat16 is the upper half of a float
#if defined(__AVX512F__)
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(w)), 16);
#elif defined(__AVX2__)
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(w)), 16);
#endif
  Words wide = __builtin_convertvector(load<Halves>(w), Words) << 16;
  return load<Vector>(&wide);
}
inline Vector numbers(const int8_t* w) {
#if defined(__AVX512F__)  // compilers convert bytes lane by lane
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(w)));
#elif defined(__AVX2__)
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)w)));
#else
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(w), Ints), Vector);
#endif
}

// The first `count` < kLanes numbers, then zeros.
template <class W>
inline Vector tail(const W* w, long count) {
  W padded[kLanes] = {};
  memcpy(padded, w, count * sizeof(W));
  return numbers(padded);
}

// The sum of all lanes, half by half.
template <int N>
inline float sum(const float (&lanes)[N]) {
  if constexpr (N == 1) {
    return lanes[0];
  } else {
    typedef float Half __attribute__((vector_size(2 * N)));
    float halves[N / 2];
    Half both = load<Half>(lanes) + load<Half>(lanes + N / 2);
    memcpy(halves, &both, sizeof both);
    return sum(halves);
  }
}
constexpr int kGroup = 24, kSlice = 6144;  // numbers of R rows that leave room in the first cache
constexpr int kAhead = 64 << 10;  // bytes to fetch ahead: far enough for memory, near enough for L2
typedef Vector Sums[kGroup];  // of one row, for the outputs of a group

// Adds the numbers [i, end) of R rows and O outputs to sums that stay in registers meanwhile.
template <class W, int R, int O>
void tile(const Product& p, const W* w, const float* x, Sums* all, int first, long i, long end) {
  Vector sums[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) sums[r][o] = i ? all[r][first + o] : Vector{};
  for (; i + kLanes <= end; i += kLanes) {
    Vector weights[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) {
      weights[o] = numbers(w + o * p.in + i);
      __builtin_prefetch((const char*)(w + o * p.in + i) + kAhead, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Vector mine = load<Vector>(x + r * p.stride + i);
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) sums[r][o] += mine * weights[o];
    }
  }
  if (i < end)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) {
      Vector weights = tail(w + o * p.in + i, end - i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r][o] += load<Vector>(x + r * p.stride + i) * weights;
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) all[r][first + o] = sums[r][o];
}

// A group of outputs and R rows, slice by slice, so that the rows' slices stay in the first cache.
template <class W, int R>
void group(const Product& p, const float* x, long out, int count, float* y) {
  constexpr int kFit = (kRegisters - 1) / (R + 1), O = kFit > 8 ? 8 : kFit;
  Sums sums[R];
  const W* w = static_cast<const W*>(p.weight) + out * p.in;
  constexpr long kStep = kSlice / R / 16 * 16;
  for (long i = 0; i < p.in; i += kStep) {
    long end = i + kStep < p.in ? i + kStep : p.in;
    int o = 0;
    for (; o + O <= count; o += O) tile<W, R, O>(p, w + o * p.in, x, sums, o, i, end);
    for (; o < count; o++) tile<W, R, 1>(p, w + o * p.in, x, sums, o, i, end);
  }
  for (int r = 0; r < R; r++)
    for (int o = 0; o < count; o++) {
      float lanes[kLanes];
      memcpy(lanes, &sums[r][o], sizeof lanes);
      y[r * p.y_stride + out + o] = sum(lanes) * (p.scale ? p.scale[out + o] : 1);
    }
}

template <class W, int R = kMostRows>
void rows(const Product& p, long count, const float* x, long out, int outputs, float* y) {
  if (count == R) return group<W, R>(p, x, out, outputs, y);
  if constexpr (R > 1) rows<W, R - 1>(p, count, x, out, outputs, y);
}

template <class W>
void product(const Product& p) {
  long passes = (p.rows + kMostRows - 1) / kMostRows;
  for (long out = p.begin; out < p.end; out += kGroup) {
    int outputs = p.end - out < kGroup ? p.end - out : kGroup;
    for (long pass = 0; pass < passes; pass++) {  // of nearly as many rows each
      long row = pass * p.rows / passes, count = (pass + 1) * p.rows / passes - row;
      rows<W>(p, count, p.x + row * p.stride, out, outputs, p.y + row * p.y_stride);
    }
  }
}
}  // namespace

extern "C" void NAME(LEVEL)(const Product& p) {
  if (p.type == 0) product<float>(p);
  if (p.type == 1) product<uint16_t>(p);
  if (p.type == 2) product<int8_t>(p);
}

#else  // the entry

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

extern "C" void few_rows_plain(const Product&);
#if defined(__x86_64__)
extern "C" void few_rows_avx2(const Product&);
extern "C" void few_rows_avx512(const Product&);
#endif

namespace {
constexpr long kPadding = 16, kChunkBytes = 1 << 16;

void (*widest())(const Product&) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return few_rows_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return few_rows_avx2;
#endif
  return few_rows_plain;
}

// Chunks of work that the calling thread and the pool's threads take until none is left.
struct Work {
  std::vector<Product> chunks;
  std::atomic<size_t> next{0}, done{0};
  std::vector<float> x;

  void run() {
    static void (*const compute)(const Product&) = widest();
    for (size_t i; (i = next.fetch_add(1)) < chunks.size();) {
      compute(chunks[i]);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// x [R, M, in] as float32 [M, R, stride], zeros after `in`.
template <class T>
void widen(const T* x, long rows, long stack, long in, long stride, float* out) {
  for (long m = 0; m < stack; m++)
    for (long r = 0; r < rows; r++, out += stride) {
      const T* from = x + (r * stack + m) * in;
      if constexpr (sizeof(T) == 4) {
        memcpy(out, from, in * sizeof(float));
      } else {
        for (long i = 0; i < in; i++) {
          uint32_t bits = uint32_t(from[i]) << 16;
          memcpy(out + i, &bits, 4);
        }
      }
      memset(out + in, 0, (stride - in) * sizeof(float));
    }
}

ffi::Error few_rows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                    ffi::AnyBuffer scale, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  auto shape = weight.dimensions();  // [out, in], or [M, out, in]
  long in = shape.back(), out = shape[shape.size() - 2], stack = shape.size() > 2 ? shape[0] : 1;
  long rows = x.element_count() / (stack * in), stride = (in + kPadding - 1) / kPadding * kPadding;
  int type = weight.element_type() == ffi::F32 ? 0 : weight.element_type() == ffi::BF16 ? 1 : 2;
  long size = type == 0 ? 4 : type == 1 ? 2 : 1;
  auto work = std::make_shared<Work>();
  work->x.resize(stack * rows * stride);
  if (x.element_type() == ffi::F32)
    widen(x.reinterpret_data<float>(), rows, stack, in, stride, work->x.data());
  else
    widen(x.reinterpret_data<uint16_t>(), rows, stack, in, stride, work->x.data());
  long threads = pool.num_threads() < 1 ? 1 : pool.num_threads();
  long most = std::max<long>(1, kChunkBytes / (in * size)), step = std::min(most, out);
  step = (step + 23) / 24 * 24;  // whole tiles of every instruction set
  const char* bytes = static_cast<const char*>(weight.untyped_data());
  for (long m = 0; m < stack; m++)
    for (long begin = 0; begin < out; begin += step)
      work->chunks.push_back({bytes + m * out * in * size,
                              scale.element_count() ? scale.reinterpret_data<float>() + m * out : nullptr,
                              work->x.data() + m * rows * stride, y->typed_data() + m * out, rows, in,
                              stride, stack * out, begin, std::min(begin + step, out), type});
  long helpers = std::min<long>(threads, work->chunks.size()) - 1;
  for (long i = 0; i < helpers; i++) pool.Schedule([work] { work->run(); });
  work->run();
  while (work->done.load(std::memory_order_acquire) < work->chunks.size()) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return ffi::Error::Success();
}
}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRows, few_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
#endif
