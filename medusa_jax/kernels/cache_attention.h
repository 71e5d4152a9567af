// What the entry of cache_attention.cpp asks of the arithmetic in cache_attention_level.cpp.

#pragma once
#include <cstdint>

constexpr long kMostWidth = 512;  // C, numbers of a head
constexpr long kMostQueries = 32;  // of a piece of work

// Keys and values of a head that queries may see: keys [C, stride], values [count, C].
struct Seen {
  const void *keys, *values;
  long stride, count;
};

// Some queries of a row of the batch and a key/value head.
struct Queries {
  const float* queries;  // [N, C], scaled; query i is of token i % T
  float* out;            // [N, C]
  Seen cache, own;       // the cache, then the block of T tokens
  const bool* mask;      // [T, own.count], whether a token sees another of its block
  const int32_t* first;  // [T], the first slot of the cache that a token sees; or null
  long width, tokens, begin, end;  // C, T, and which of the queries
  int type;                        // of keys and values: 0 float32, 1 bfloat16
};
