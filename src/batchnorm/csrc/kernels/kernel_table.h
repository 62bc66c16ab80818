// The interface between the drivers (kernels/) and the loops (simd/): what a loop is given, and tables of function
// pointers, one for each instruction set. Nothing here depends on torch or on threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bn {

enum class Dtype : int { f32, f64, bf16, f16 };
constexpr int kDtypes = 4;

inline std::size_t size_of(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

enum class Activation : int { none, relu, relu6, leaky_relu, silu, hardswish, sigmoid, tanh };

// The loops are compiled for the forms that are frequent in networks. `generic` tests the activation and the residual
// at run time, once a vector. `generic_masked` does the same under a valid_mask.
enum Variant : int { plain, relu, relu_residual, generic, generic_masked };
constexpr int kVariants = 5;

// The order of the per-channel coefficients. A loop reads them in the type in which it computes.
//   z  = (x - center) * scale + shift
//   dx = dz * scale + ((x - center) * slope + offset)
// `center` is the mean, rounded to that type. `shift` contains what the rounding left.
enum Coef : int { center, scale, shift, slope, offset };
constexpr int kCoefs = 5;

// Prefetch distances into the first-level and the second-level cache.
constexpr std::int64_t kL1PrefetchBytes = 4096, kL2PrefetchBytes = 16384;

constexpr int kMaxItemChannels = 32;  // of a contiguous chunk

// One chunk of a tensor, as a loop sees it. A row is `length` adjacent values.
// Contiguous: each of `channels` adjacent channels has `rows` rows, one a sample. Short channels share a chunk, so that
// memory is read in longer pieces than one channel's.
// Channels last: `rows` adjacent rows, one a pixel. Each value of a row belongs to another channel.
struct Chunk {
  const void* x = nullptr;
  const void* grad = nullptr;  // grad_output
  const void* residual = nullptr;
  const std::uint8_t* valid_mask = nullptr;  // contiguous: a byte a value; channels last: a byte a row
  // What the loop writes: the output, or grad_input (null: not wanted). A contiguous loop that only sums takes it as
  // what the next pass will write, and prefetches it (null: no prefetch).
  void* out = nullptr;
  void* grad_residual = nullptr;  // null: not wanted
  std::int64_t rows = 0, length = 0, row_stride = 0, mask_stride = 0;
  // Contiguous: the offset from a row to the row that is processed next. It is negative where the rows are processed
  // from the last one to the first one.
  std::int64_t next_row = 0;
  // For a loop that writes: prefetch distance into the second-level cache, in values; 0 = none. The channels-last loops
  // compute their own.
  std::int64_t l2_distance = 0;
  std::int64_t channels = 1, channel_stride = 0;  // contiguous
  const void* coefs = nullptr;
  std::int64_t coef_stride = 1;  // from the values of one coefficient to those of the next
  double negative_slope = 0;
  // Not 0: x contains outputs, and z is output * undo_slope where the output is negative, else the output itself. The
  // loops then use z - center in place of x - center.
  double undo_slope = 0;
  Activation activation = Activation::none;
  bool stream = false;   // write with stream (non-temporal) stores
  bool prefetch = true;  // false where all tensors are in cache: a prefetch then costs as much as a load
};

struct LoopTable {
  // n values, `stride` apart, to float64, and n adjacent ones back. The conversion back rounds once.
  void (*to_float64)(const void* x, std::int64_t n, std::int64_t stride, double* out);
  void (*from_float64)(const double* x, std::int64_t n, void* out);
  // Brings float32 coefficients from the order of the channels into the order in which a channels-last loop reads them.
  // Null: the order is the same.
  void (*reorder_coefs)(float* coefs, std::int64_t n) = nullptr;
  // For each channel Σ(x - shift) and Σ(x - shift)² over the valid positions, in float64. The caller sets `sum` and
  // `square` to zero. 16-bit data are summed without a shift.
  void (*moments_contiguous)(const Chunk&, const double* shift, double* sum, double* square);
  void (*moments_channels_last)(const Chunk&, const double* shift, double* sum, double* square);
  void (*apply_contiguous[kVariants])(const Chunk&);
  void (*apply_channels_last[kVariants])(const Chunk&);
  // For each channel Σ dz and Σ dz·(x - center). The caller sets them to zero. False: a product may have been
  // subnormal.
  bool (*backward_reduce_contiguous[kVariants])(const Chunk&, double* sum_dz, double* sum_dz_x);
  bool (*backward_reduce_channels_last[kVariants])(const Chunk&, double* sum_dz, double* sum_dz_x);
  void (*backward_elemt_contiguous[kVariants])(const Chunk&);
  void (*backward_elemt_channels_last[kVariants])(const Chunk&);
};

// Where the coefficients of adjacent channels stand, and the values they are computed from, in float64.
struct ChannelCoefs {
  double *center, *scale, *shift, *slope, *offset;
  double* residue;  // mean - center
  double* invstd;
};

// Work that is done once a channel, in float64, on n adjacent channels.
struct ChannelKernels {
  // 1/√(var + eps). Root and quotient are rounded correctly, so all instruction sets give the same bits.
  void (*invstd)(const double* var, double eps, std::int64_t n, double* out);
  void (*finite_or_zero)(double* values, std::int64_t n);
  bool (*all_finite)(const double* values, std::int64_t n);
  // In place: Σd and Σd² of `count` values become the mean of (x - shift) and Σ(x - mean)². d is x - shift where
  // `shifted`, else x.
  void (*sums_to_moments)(const double* shift, bool shifted, double count, std::int64_t n, double* sum, double* square);
  // Merges the moments of n_b values into those of n_a values (Chan, Golub and LeVeque 1979). Both are above 0. `a` and
  // `b` have three rows, `width` apart: the mean of (x - shift), Σ(x - mean)², and shift. The shifts of a and b differ.
  void (*chan_merge)(double n_a, double n_b, std::int64_t n, std::int64_t width, double* a, const double* b);
  void (*add)(const double* more, std::int64_t n, double* sums);
  // Coefficients of z, from invstd, weight and bias (null: 1 and 0). `float32_center`: center becomes a float32 value
  // and residue the remainder. True where float32 is too narrow: a coefficient, or a difference that it multiplies, may
  // overflow or lose its digits.
  bool (*affine_coefs)(const double* mean, const double* weight, const double* bias, bool float32_center,
                       std::int64_t n, const ChannelCoefs&);
  // slope and offset of dx, from the sums of 1/inverse_count values. `scaled`: slope is multiplied by scale too. The
  // result is as for affine_coefs.
  bool (*backward_coefs)(const double* sum_dy, const double* sum_dy_xmu, double inverse_count, bool scaled,
                         std::int64_t n, const ChannelCoefs&);
  // To float32. Every NaN becomes the same NaN, without a payload.
  void (*to_float32)(const double* values, std::int64_t n, float* out);
  // Gives each of a channel's adjacent `columns` the value of the channel.
  void (*spread)(const float* of_channels, std::int64_t n, std::int64_t columns, float* out);
  void (*spread_float64)(const double* of_channels, std::int64_t n, std::int64_t columns, double* out);
  // The sums of a channel's columns. The order of the additions depends on `columns` alone.
  void (*gather)(const double* of_columns, std::int64_t n, std::int64_t columns, double* out);
};

struct Kernels {
  const char* name;
  ChannelKernels channels;
  LoopTable loops[kDtypes];
  LoopTable float64_loops[kDtypes];  // float64 arithmetic on the same data, where float32 coefficients are too narrow
};

const Kernels& kernels_default();
const Kernels& kernels_avx2();    // x86-64 only
const Kernels& kernels_avx512();  // x86-64 only

// The kernels of the widest instruction set that this processor has and that BATCHNORM_CPU_CAPABILITY (default | avx2 |
// avx512) allows.
const Kernels& kernels();

}  // namespace bn
