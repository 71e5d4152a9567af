// Products of few rows: y[r, m, o] = scale[m, o] * sum_i x[r, m, i] W[m, o, i].
//
// A decode step multiplies 1 to 32 rows by each weight, so it should take the time of reading
// the weight. Each block of outputs is read from memory once and meets all rows while it is in
// registers or in the first cache. This is the entry that XLA calls: it shares the work out to
// threads. few_rows_level.cpp has the arithmetic, compiled once for each instruction set.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "few_rows.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define LEVEL_OF(name)                     \
  extern "C" void few_rows_##name(const Product&); \
  extern "C" float round_row_##name(const float*, long, int16_t*);
LEVEL_OF(plain)
#if defined(__x86_64__)
LEVEL_OF(avx2)
LEVEL_OF(avx512)
LEVEL_OF(vnni)
#endif

namespace {
struct Level {
  const char* name;
  void (*product)(const Product&);
  float (*round)(const float*, long, int16_t*);
};
#define LEVEL_NAMED(name) Level{#name, few_rows_##name, round_row_##name}

const Level& widest() {
  static const Level level = [] {
#if defined(__x86_64__)
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) return LEVEL_NAMED(vnni);
    if (avx512) return LEVEL_NAMED(avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return LEVEL_NAMED(avx2);
#endif
    return LEVEL_NAMED(plain);
  }();
  return level;
}

constexpr long kChunkBytes = 1 << 15, kShareBytes = 1 << 17;  // of a chunk; worth waking a thread

// Work for several threads. Each takes chunks of a share of its own, which is contiguous, so that
// what it fetches ahead is for itself; then it helps with what is left of the others' shares.
struct Work {
  std::vector<Product> chunks;
  std::vector<float> floats, scales;  // rows that had to be converted
  std::vector<int16_t> shorts;
  long shares;
  std::unique_ptr<std::atomic<long>[]> next;  // chunk of each share
  std::atomic<long> done{0};

  long start(long share) { return share * chunks.size() / shares; }

  void run(long own) {
    for (long i = 0; i < shares; i++) {
      long share = (own + i) % shares, end = start(share + 1);
      for (long chunk; (chunk = next[share].fetch_add(1)) < end;) {
        widest().product(chunks[chunk]);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  }
};

// Rows [R, M, in] of x for M weights: as they are, widened to float32, or rounded to integers.
// `p` gets those of the first weight; those of weight m begin m * p.in numbers further.
void prepare(const ffi::AnyBuffer& x, long rows, long stack, Work& work, Product& p) {
  long count = x.element_count();
  p.x_stride = stack * p.in;
  p.x = x.untyped_data();
  if (x.element_type() == ffi::BF16) {
    work.floats.resize(count);
    const uint16_t* from = x.reinterpret_data<uint16_t>();
    for (long i = 0; i < count; i++) {
      uint32_t bits = uint32_t(from[i]) << 16;
      memcpy(&work.floats[i], &bits, 4);
    }
    p.x = work.floats.data();
  }
  if (p.type == 2) {
    work.shorts.resize(count);
    work.scales.resize(rows * stack);
    auto* from = static_cast<const float*>(p.x);
    for (long m = 0; m < stack; m++)
      for (long r = 0; r < rows; r++) {
        long row = r * stack + m;
        work.scales[m * rows + r] =
            widest().round(from + row * p.in, p.in, work.shorts.data() + row * p.in);
      }
    p.x = work.shorts.data();
  }
}

ffi::Error few_rows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                    ffi::AnyBuffer scale, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  auto shape = weight.dimensions();  // [out, in], or [M, out, in]
  long in = shape.back(), out = shape[shape.size() - 2], stack = shape.size() > 2 ? shape[0] : 1;
  long rows = x.element_count() / (stack * in);
  int type = weight.element_type() == ffi::F32 ? 0 : weight.element_type() == ffi::BF16 ? 1 : 2;
  long size = type == 0 ? 4 : type == 1 ? 2 : 1, x_size = type == 2 ? 2 : 4;
  auto work = std::make_shared<Work>();
  Product whole{weight.untyped_data(), nullptr, nullptr, nullptr, y->typed_data(), rows, in};
  whole.y_stride = stack * out;
  whole.type = type;
  prepare(x, rows, stack, *work, whole);
  long step = std::max<long>(1, kChunkBytes / (in * size));
  step = (step + 23) / 24 * 24;  // whole groups
  for (long m = 0; m < stack; m++)
    for (long begin = 0; begin < out; begin += step) {
      Product chunk = whole;
      chunk.weight = static_cast<const char*>(whole.weight) + m * out * in * size;
      chunk.scale = scale.element_count() ? scale.reinterpret_data<float>() + m * out : nullptr;
      chunk.x = static_cast<const char*>(whole.x) + m * in * x_size;
      chunk.x_scale = type == 2 ? work->scales.data() + m * rows : nullptr;
      chunk.y = whole.y + m * out;
      chunk.begin = begin;
      chunk.end = std::min(begin + step, out);
      work->chunks.push_back(chunk);
    }
  long threads = std::max<long>(1, pool.num_threads()), most = stack * out * in * size / kShareBytes;
  work->shares = std::min({threads, std::max<long>(1, most), long(work->chunks.size())});
  work->next.reset(new std::atomic<long>[work->shares]);
  for (long i = 0; i < work->shares; i++) work->next[i] = work->start(i);
  for (long i = 1; i < work->shares; i++) pool.Schedule([work, i] { work->run(i); });
  work->run(0);
  while (work->done.load(std::memory_order_acquire) < long(work->chunks.size())) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return ffi::Error::Success();
}
}  // namespace

extern "C" const char* few_rows_level() { return widest().name; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRows, few_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
