// Products of few rows: y[r, m, o] = scale[m, o] * sum_i x[r, m, i] W[m, o, i], or with a scale of
// each group of inputs: sum_g scale[m, o, g] * sum_{i in g} x[r, m, i] W[m, o, i].
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
#include "levels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

ALL_LEVELS(void, few_rows, const Product&)
ALL_LEVELS(float, round_row, const float*, long, int16_t*)

namespace {
constexpr long kChunkBytes = 1 << 15, kShareBytes = 1 << 17;  // of a chunk; worth waking a thread

// Work for several threads. Each takes chunks of a share of its own, which is contiguous, so that
// what it fetches ahead is for itself; then it helps with what is left of the others' shares.
struct Work {
  std::vector<Product> chunks;
  std::vector<float> floats, scales;  // rows that had to be converted
  std::vector<int16_t> shorts;
  std::vector<long> places;  // of the rows that are no zeros
  long shares;
  std::unique_ptr<std::atomic<long>[]> next;  // chunk of each share
  std::atomic<long> done{0};

  long start(long share) { return share * chunks.size() / shares; }

  void run(long own) {
    for (long i = 0; i < shares; i++) {
      long share = (own + i) % shares, end = start(share + 1);
      for (long chunk; (chunk = next[share].fetch_add(1)) < end;) {
        few_rows_of()(chunks[chunk]);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  }
};

// Rows of zeros have outputs of zeros, which are written here, and take part in nothing else:
// padding of a prompt, and rows of a batch whose texts have ended.
void leave_out_zeros(Work& work, Product& p) {
  auto* x = static_cast<const float*>(p.x);
  bool apart = false;  // whether a row of zeros stands before another row
  for (long r = 0; r < p.rows; r++) {
    const float* row = x + r * p.x_stride;
    if (std::all_of(row, row + p.x_stride, [](float number) { return number == 0; })) {
      memset(p.y + r * p.y_stride, 0, p.y_stride * sizeof(float));
    } else {
      apart |= long(work.places.size()) < r;
      work.places.push_back(r);
    }
  }
  p.rows = work.places.size();
  p.places = work.places.data();
  if (!apart) return;
  std::vector<float> together;
  for (long r : work.places)
    together.insert(together.end(), x + r * p.x_stride, x + (r + 1) * p.x_stride);
  work.floats.swap(together);
  p.x = work.floats.data();
}

// Even numbers of a row, then odd ones: as weights of 4 bits are taken out of their bytes.
void evens_first(int16_t* row, long count) {
  std::vector<int16_t> numbers(row, row + count);
  for (long i = 0; i < count; i++) row[i / 2 + i % 2 * (count / 2)] = numbers[i];
}

// Rows [R, M, in] of x for M weights: as they are, widened to float32, or rounded to integers.
// `p` gets those of the first weight; those of weight m begin m * p.in numbers further.
void prepare(const ffi::AnyBuffer& x, long stack, Work& work, Product& p) {
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
  leave_out_zeros(work, p);
  if (p.type >= 2) {
    work.shorts.resize(p.rows * p.x_stride);
    work.scales.resize(p.rows * stack);
    auto* from = static_cast<const float*>(p.x);
    for (long m = 0; m < stack; m++)
      for (long r = 0; r < p.rows; r++) {
        long row = r * stack + m;
        work.scales[m * p.rows + r] =
            round_row_of()(from + row * p.in, p.in, work.shorts.data() + row * p.in);
        if (p.type == 3) evens_first(work.shorts.data() + row * p.in, p.in);
      }
    p.x = work.shorts.data();
  }
}

// `layer` is the number of the weight that is meant among those of L layers [1], or [].
ffi::Error few_rows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                    ffi::AnyBuffer scale, ffi::Buffer<ffi::S32> layer,
                    ffi::Result<ffi::Buffer<ffi::F32>> y) {
  auto shape = weight.dimensions();  // [out, in], [M, out, in], or [L, out, in]
  bool alone = shape.size() == 2 || layer.element_count();
  long in = shape.back(), out = shape[shape.size() - 2], stack = alone ? 1 : shape[0];
  long first = layer.element_count() ? std::clamp<long>(layer.typed_data()[0], 0, shape[0] - 1) : 0;
  auto number = weight.element_type();
  int type = number == ffi::F32 ? 0 : number == ffi::BF16 ? 1 : number == ffi::S8 ? 2 : 3;
  long x_size = type >= 2 ? 2 : 4;
  long bytes = type == 0 ? 4 * in : type == 1 ? 2 * in : type == 2 ? in : in / 2;  // of an output
  bool grouped = scale.dimensions().size() == shape.size();
  long scales = grouped ? scale.dimensions().back() : 1;  // of an output
  if ((grouped || type == 3) && (!scale.element_count() || in % (scales * (type == 3 ? 64 : 32))))
    return ffi::Error::InvalidArgument("groups of a weight do not fit the kernel of few rows");
  auto work = std::make_shared<Work>();
  Product whole{};
  whole.weight = static_cast<const char*>(weight.untyped_data()) + first * out * bytes;
  whole.y = y->typed_data();
  whole.rows = x.element_count() / (stack * in);
  whole.in = in;
  whole.groups = grouped || type == 3 ? scales : 0;
  whole.y_stride = stack * out;
  whole.type = type;
  prepare(x, stack, *work, whole);
  const float* factors = scale.element_count() ? scale.reinterpret_data<float>() : nullptr;
  if (factors) factors += first * out * scales;
  long step = std::max<long>(1, kChunkBytes / bytes);
  step = (step + 23) / 24 * 24;  // whole groups
  for (long m = 0; m < stack; m++)
    for (long begin = 0; begin < out; begin += step) {
      Product chunk = whole;
      chunk.weight = static_cast<const char*>(whole.weight) + m * out * bytes;
      chunk.scale = factors ? factors + m * out * scales : nullptr;
      chunk.x = static_cast<const char*>(whole.x) + m * in * x_size;
      chunk.x_scale = type >= 2 ? work->scales.data() + m * whole.rows : nullptr;
      chunk.y = whole.y + m * out;
      chunk.begin = begin;
      chunk.end = std::min(begin + step, out);
      work->chunks.push_back(chunk);
    }
  long threads = std::max<long>(1, pool.num_threads()), most = stack * out * bytes / kShareBytes;
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

extern "C" const char* widest_level() {
  return widest() == kVnni ? "vnni" : widest() == kAvx512 ? "avx512" : widest() == kAvx2 ? "avx2" : "plain";
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRows, few_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
