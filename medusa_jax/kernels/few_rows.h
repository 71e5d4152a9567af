// What the entry of few_rows.cpp asks of the arithmetic in few_rows_level.cpp.

#pragma once
#include <cstdint>

// What all instruction sets compute: outputs [begin, end) of a single weight for R rows.
struct Product {
  const void* weight;    // [out, in]
  const float* scale;    // [out], or [out, groups] of as many numbers each; or null
  const void* x;         // R rows of `x_stride` numbers: float32, or int16 for int8 and int4 weights
  const float* x_scale;  // [R], what the integers of a row are multiplied by; or null
  float* y;              // rows of `y_stride`
  const long* places;    // [R], the rows of y that they are
  long rows, in, groups, x_stride, y_stride, begin, end;  // groups: 0 if an output has one scale
  int type;  // of the weight: 0 float32, 1 bfloat16, 2 int8, 3 int4: two in a byte, low bits first
};
