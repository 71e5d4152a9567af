// The instruction sets that the files *_level.cpp are compiled for: each once, as LEVEL.

#pragma once

#define JOIN_NAMES(a, b) a##_##b
#define NAME_OF(function, level) JOIN_NAMES(function, level)
#define OF_LEVEL(function) NAME_OF(function, LEVEL)

enum Level { kPlain, kAvx2, kAvx512, kVnni };

// The widest that this processor has.
static inline Level widest() {
  static const Level level = [] {
#if defined(__x86_64__)
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) return kVnni;
    if (avx512) return kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
    return kPlain;
  }();
  return level;
}

// Declares a function of all levels, and `function_of()`, which is that of the widest.
#if defined(__x86_64__)
#define ALL_LEVELS(result, function, ...)                                                       \
  extern "C" result function##_plain(__VA_ARGS__);                                              \
  extern "C" result function##_avx2(__VA_ARGS__);                                               \
  extern "C" result function##_avx512(__VA_ARGS__);                                             \
  extern "C" result function##_vnni(__VA_ARGS__);                                               \
  static inline auto function##_of() {                                                                 \
    return widest() == kVnni ? function##_vnni : widest() == kAvx512 ? function##_avx512        \
           : widest() == kAvx2 ? function##_avx2 : function##_plain;                            \
  }
#else
#define ALL_LEVELS(result, function, ...)          \
  extern "C" result function##_plain(__VA_ARGS__); \
  static inline auto function##_of() { return function##_plain; }
#endif
