// Softmax attention of a block of tokens to the cache and to the block itself, on a CPU.
//
// Blocks of slots stay in the first cache while all queries of a key/value head meet them, and
// slots that no query sees are not read. This is the entry that XLA calls: it shares the heads
// out to threads. cache_attention_level.cpp has the arithmetic.

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "cache_attention.h"
#include "levels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

ALL_LEVELS(void, cache_attention, const Queries&)

namespace {
constexpr long kWorthwhile = 1 << 19;  // products that are worth waking a thread
constexpr long kFewQueries = 8;        // of a piece that is read for them alone

struct Work {
  std::vector<Queries> pieces;
  std::atomic<size_t> next{0}, done{0};

  void run() {
    for (size_t piece; (piece = next.fetch_add(1)) < pieces.size();) {
      cache_attention_of()(pieces[piece]);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// queries [B, K, G, T, C]; own keys [B, K, C, U] and values [B, K, U, C]; mask [1 or B, T, U];
// keys [R, K, C, S] and values [R, K, S, C]; lengths [B]; first [B, T] or []; row [1] or [];
// layer [1] or [], where keys and values are those of L layers, [R, L, ., ., .]; live [B, T] or [].
ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> queries, ffi::AnyBuffer own_keys,
                  ffi::AnyBuffer own_values, ffi::Buffer<ffi::PRED> mask, ffi::AnyBuffer keys,
                  ffi::AnyBuffer values, ffi::Buffer<ffi::S32> lengths,
                  ffi::Buffer<ffi::S32> first, ffi::Buffer<ffi::S32> row,
                  ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::PRED> live,
                  ffi::Result<ffi::Buffer<ffi::F32>> out) {
  auto shape = queries.dimensions();
  long heads = shape[1], tokens = shape[3], width = shape[4], count = shape[2] * tokens;
  auto held = values.dimensions();
  long slots = held[held.size() - 2], others = own_values.dimensions()[2];
  long layers = held.size() == 5 ? held[1] : 1;
  long number = layer.element_count() ? std::clamp<long>(layer.typed_data()[0], 0, layers - 1) : 0;
  long masked = mask.dimensions()[0] == 1 ? 0 : tokens * others;
  bool narrow = keys.element_type() == ffi::BF16;
  long size = narrow ? 2 : 4;
  auto at = [&](const ffi::AnyBuffer& numbers, long index) {
    return static_cast<const char*>(numbers.untyped_data()) + index * size;
  };
  auto work = std::make_shared<Work>();
  long products = 0, most = kMostQueries, pieces = shape[0] * heads * ((count + most - 1) / most);
  if (pieces % pool.num_threads() && pieces < 4 * pool.num_threads()) most = kFewQueries;
  for (long b = 0; b < shape[0]; b++) {
    long length = std::clamp<long>(lengths.typed_data()[b], 0, slots);
    long filled = row.element_count() ? std::clamp<long>(row.typed_data()[0], 0, held[0] - 1) : b;
    for (long k = 0; k < heads; k++) {
      long head = b * heads + k, cached = ((filled * layers + number) * heads + k) * width * slots;
      long block = head * width * others;
      Queries piece{};
      piece.queries = queries.typed_data() + head * count * width;
      piece.out = out->typed_data() + head * count * width;
      piece.cache = {at(keys, cached), at(values, cached), slots, length};
      piece.own = {at(own_keys, block), at(own_values, block), others, others};
      piece.mask = mask.typed_data() + b * masked;
      piece.first = first.element_count() ? first.typed_data() + b * tokens : nullptr;
      piece.width = width, piece.tokens = tokens, piece.type = narrow;
      for (long begin = 0; begin < count; begin += most) {
        piece.begin = begin, piece.end = std::min(begin + most, count);
        bool wanted = !live.element_count();
        for (long i = begin; i < piece.end && !wanted; i++)
          wanted = live.typed_data()[b * tokens + i % tokens];
        if (!wanted) {
          std::fill(piece.out + begin * width, piece.out + piece.end * width, 0.f);
          continue;
        }
        work->pieces.push_back(piece);
        products += 2 * (piece.end - begin) * width * (length + others);
      }
    }
  }
  long threads = std::min<long>(pool.num_threads(), work->pieces.size());
  if (products < kWorthwhile) threads = 1;
  for (long i = 1; i < threads; i++) pool.Schedule([work] { work->run(); });
  work->run();
  while (work->done.load(std::memory_order_acquire) < work->pieces.size()) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return ffi::Error::Success();
}
}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CacheAttention, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
