// Vectors of floats as wide as the instruction set that a file is compiled for.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {
#if defined(__AVX512F__)
constexpr int kBytes = 64, kMostRows = 8, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kBytes = 32, kMostRows = 4, kRegisters = 16;
#else
constexpr int kBytes = 16, kMostRows = 4, kRegisters = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));

template <class T>
inline T load(const void* from) {
  T value;
  memcpy(&value, from, sizeof(T));
  return value;
}

// Numbers in memory as what is multiplied.
inline Vector numbers(const float* w) { return load<Vector>(w); }
inline Vector numbers(const uint16_t* w) {  // bfloat16 is the upper half of a float
#if defined(__AVX512F__)  // compilers convert lane by lane
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(w)), 16);
#elif defined(__AVX2__)
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(w)), 16);
#endif
  Words wide = __builtin_convertvector(load<Halves>(w), Words) << 16;
  return load<Vector>(&wide);
}
}  // namespace
