// y = x @ weight.T for few rows of x, which reads the weight at the pace of memory.
//
// A core multiplies faster than memory delivers, if memory is asked early enough. So each block of rows of the weight
// asks for the block after it: with Llama-3.2-1B's shape 28 to 30 GB/s instead of 19 to 21, where memory delivers 31.
// GNU vectors, so that one text serves all CPUs; bfloat16 is widened by a shift and a mask and needs no instructions.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 2;  // the sums of a block fill 8 of 16 registers
#else
constexpr int LANES = 4, ROWS = 2;
#endif
constexpr int STEP = 2 * LANES, COLUMNS = 4;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef _Float16 Halves __attribute__((vector_size(2 * LANES)));
struct bfloat16 {
  uint16_t bits;
};

template <class V>
V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

Floats widen(Halves h) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps((__m128i)h);
#else
  return __builtin_convertvector(h, Floats);
#endif
}

// ---- STEP numbers as two vectors of floats, in an order that is the type's own

void unpack(const float* from, Floats* to) {
  to[0] = load<Floats>(from);
  to[1] = load<Floats>(from + LANES);
}

void unpack(const _Float16* from, Floats* to) {
  to[0] = widen(load<Halves>(from));
  to[1] = widen(load<Halves>(from + LANES));
}

void unpack(const bfloat16* from, Floats* to) {  // those of even and of odd index: a shift and a mask
  Words words = load<Words>(from);
  to[0] = (Floats)(words << 16);
  to[1] = (Floats)(words & 0xffff0000u);
}

template <class T>
void unpack_rest(const T* from, int64_t count, Floats* to) {
  T padded[STEP] = {};
  std::memcpy(padded, from, count * sizeof(T));
  unpack(padded, to);
}

// ---- products

// y[c][r] of R rows of the weight and C columns of x, which is unpacked, in `steps` steps
template <int R, int C, class T>
void block(const T* weight, int64_t in, const Floats* x, int64_t steps, float* y, int64_t out) {
  Floats sums[C][R] = {};
  auto add = [&](int r, int64_t step, const Floats* w) {
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      const Floats* v = x + 2 * (c * steps + step);
      sums[c][r] += w[0] * v[0];
      sums[c][r] += w[1] * v[1];
    }
  };
  int64_t whole = in / STEP;
  for (int64_t step = 0; step < whole; step++) {
    const T* from = weight + step * STEP;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) __builtin_prefetch(from + (R + r) * in, 0, 1);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Floats w[2];
      unpack(from + r * in, w);
      add(r, step, w);
    }
  }
  if (whole < steps)
    for (int r = 0; r < R; r++) {
      Floats w[2];
      unpack_rest(weight + r * in + whole * STEP, in % STEP, w);
      add(r, whole, w);
    }
  for (int c = 0; c < C; c++)
    for (int r = 0; r < R; r++) {
      float sum = 0;
      for (int i = 0; i < LANES; i++) sum += sums[c][r][i];
      y[c * out + r] = sum;
    }
}

template <int R, class T>
void block_of_rows(const T* weight, int64_t in, const Floats* x, int64_t steps, float* y, int64_t columns, int64_t out) {
  int64_t c = 0;
  for (; c + COLUMNS <= columns; c += COLUMNS) block<R, COLUMNS>(weight, in, x + 2 * c * steps, steps, y + c * out, out);
  for (; c < columns; c++) block<R, 1>(weight, in, x + 2 * c * steps, steps, y + c * out, out);
}

template <class T>
void product(const void* x_data, const void* weight_data, float* y, int64_t columns, int64_t in, int64_t out) {
  const T *x = (const T*)x_data, *weight = (const T*)weight_data;
  int64_t steps = (in + STEP - 1) / STEP;
  static thread_local std::vector<Floats> unpacked;
  unpacked.resize(2 * columns * steps);
  Floats* to = unpacked.data();
  for (int64_t c = 0; c < columns; c++)
    for (int64_t step = 0; step < steps; step++, to += 2) {
      const T* from = x + c * in + step * STEP;
      if (step < in / STEP) unpack(from, to);
      else unpack_rest(from, in % STEP, to);
    }
  const Floats* floats = unpacked.data();
  int64_t blocks = out / ROWS;
#pragma omp parallel for
  for (int64_t b = 0; b < blocks; b++)
    block_of_rows<ROWS>(weight + b * ROWS * in, in, floats, steps, y + b * ROWS, columns, out);
  for (int64_t r = blocks * ROWS; r < out; r++)
    block_of_rows<1>(weight + r * in, in, floats, steps, y + r, columns, out);
}

}  // namespace

// x [columns,in], weight [out,in] -> y [columns,out], float32. For Python, by ctypes
extern "C" void few_rows_linear(
    const void* x, const void* weight, float* y, int64_t columns, int64_t in, int64_t out, int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) product<float>(x, weight, y, columns, in, out);
  if (dtype == aoti_torch_dtype_float16()) product<_Float16>(x, weight, y, columns, in, out);
  if (dtype == aoti_torch_dtype_bfloat16()) product<bfloat16>(x, weight, y, columns, in, out);
}

// The same for ahead-of-time code, by the name and the arguments that it gives an operator
extern "C" AOTITorchError aoti_torch_cpu_few_rows_linear(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* y) {
  int64_t dimensions, *x_shape, *weight_shape, columns = 1;
  int32_t dtype;
  void *x_data, *weight_data, *y_data;
  aoti_torch_get_dim(x, &dimensions);
  aoti_torch_get_sizes(x, &x_shape);
  aoti_torch_get_sizes(weight, &weight_shape);
  aoti_torch_get_dtype(x, &dtype);
  std::vector<int64_t> shape(x_shape, x_shape + dimensions), strides(dimensions, 1);
  shape.back() = weight_shape[0];
  for (int64_t i = dimensions - 1; i > 0; i--) {
    strides[i - 1] = strides[i] * shape[i];
    columns *= shape[i - 1];
  }
  AOTITorchError error = aoti_torch_empty_strided(
      dimensions, shape.data(), strides.data(), aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, y);
  if (error != AOTI_TORCH_SUCCESS) return error;
  aoti_torch_get_data_ptr(x, &x_data);
  aoti_torch_get_data_ptr(weight, &weight_data);
  aoti_torch_get_data_ptr(*y, &y_data);
  few_rows_linear(x_data, weight_data, (float*)y_data, columns, weight_shape[1], weight_shape[0], dtype);
  return AOTI_TORCH_SUCCESS;
}
