// What the instruction-set specific code offers to the rest: the innermost loops, as tables of function pointers.
// Nothing here knows of torch or of threads.
#pragma once

#include <cstdint>

namespace bn {

enum class Dtype : int { f32, f64, bf16, f16 };
constexpr int kDtypes = 4;

enum class Act : int { none, relu, relu6, leaky_relu, silu, hardswish, sigmoid, tanh };

// Loops are compiled for the forms that networks are made of; `any` looks at the activation and the residual at run
// time, once a vector, and `any_masked` does so under a padding mask.
enum Variant : int { plain, relu, relu_residual, any, any_masked };
constexpr int kVariants = 5;

// Order of the per-channel coefficients, `width` values each, in the type that the loop computes in.
//   z  = (x - center) * scale + shift          center + what shift absorbs is the mean, kept beyond float32
//   dx = dz * scale + ((x - center) * slope + offset)
enum Coef : int { center, scale, shift, slope, offset };
constexpr int kCoefs = 5;

constexpr std::int64_t kDeepBytes = 16384;  // how far ahead memory is asked for what the second-level cache is to have

constexpr int kMostChannels = 32;  // of a slab of lines

// A piece of a tensor. "Lines" are `runs` samples, `stride` apart, each with `channels` adjacent channels of `length`
// values (short ones go together, so that memory is read in longer stretches than one channel's). A "grid" is `runs`
// rows of `length` values, one column a channel, rows adjacent.
struct Slab {
  const void* x = nullptr;
  const void* grad = nullptr;      // grad_output
  const void* residual = nullptr;
  const std::uint8_t* mask = nullptr;  // line: a byte a value; grid: a byte a row
  void* out = nullptr;             // result of apply; grad_input of elemt (may be null there). Of lines that are summed
                                   // what the next pass writes, fetched meanwhile; null = it comes later
  void* grad_residual = nullptr;   // may be null
  std::int64_t runs = 0, length = 0, stride = 0, mask_stride = 0;
  std::int64_t turn = 0;           // lines: from a run to the one that is taken next; below 0 = from the last run back
  std::int64_t next = 0;           // of a pass that writes: from a value to what is fetched ahead into the second-level
                                   // cache. A grid's loops set it themselves
  std::int64_t channels = 1, channel_stride = 0;  // lines
  const void* coef = nullptr;
  std::int64_t coef_width = 1;     // from one coefficient's values to the next one's
  double negative_slope = 0;
  double restore = 0;              // x holds the outputs: what those below 0 are multiplied by for z; 0 = it holds inputs.
                                   // Then x - center is z - center
  Act act = Act::none;
  bool stream = false;             // write past the caches
};

struct Leaf {
  // n values as float64, and back, rounded once
  void (*widen)(const void* x, std::int64_t n, double* out);
  void (*narrow)(const double* x, std::int64_t n, void* out);
  // the order in which a grid takes its float32 coefficients, from the channels' order; null = as they come
  void (*arrange)(float* coefs, std::int64_t n) = nullptr;
  // for each channel Σ(x - shift) and Σ(x - shift)² over the real positions, in float64; sum and square come as zeros.
  // 16-bit data are taken without a shift.
  void (*moments_line)(const Slab&, const double* shift, double* sum, double* square);
  void (*moments_grid)(const Slab&, const double* shift, double* sum, double* square);
  void (*apply_line[kVariants])(const Slab&);
  void (*apply_grid[kVariants])(const Slab&);
  // for each channel Σ dz and Σ dz·(x - center), to zeros; false where products may have been subnormal
  bool (*reduce_line[kVariants])(const Slab&, double* sum_dz, double* sum_dz_x);
  bool (*reduce_grid[kVariants])(const Slab&, double* sum_dz, double* sum_dz_x);
  void (*elemt_line[kVariants])(const Slab&);
  void (*elemt_grid[kVariants])(const Slab&);
};

// The coefficients of adjacent channels, and what they are made of, in float64.
struct ChannelCoefs {
  double *center, *scale, *shift, *slope, *offset, *residue, *invstd;
};

// What is done once a channel, in float64, to n adjacent channels.
struct ChannelKernels {
  // 1/√(var + eps), correctly rounded twice: the same on every instruction set
  void (*invstd)(const double* var, double eps, std::int64_t n, double* out);
  void (*finite_or_zero)(double* values, std::int64_t n);
  bool (*finite)(const double* values, std::int64_t n);
  // Sums of d and d², of `count` values, become the mean of x - shift and Σ(x - mean)²; d is x - shift or, not shifted, x
  void (*settle)(const double* shift, bool shifted, double count, std::int64_t n, double* sum, double* square);
  // Of n_a values the mean of x - shift, Σ(x - mean)² and shift, `width` behind each other, put together with those of
  // n_b others, whose shift is another one; neither number is 0
  void (*join)(double n_a, double n_b, std::int64_t n, std::int64_t width, double* a, const double* b);
  void (*add)(const double* more, std::int64_t n, double* sums);
  // invstd to scale, from what stands for the mean (`narrow`: center as a float32, the rest in residue), weight and bias
  // (null: 1 and 0). True where float32 coefficients, or the differences they multiply, may overflow or lose their digits.
  bool (*affine)(const double* mean, const double* weight, const double* bias, bool narrow, std::int64_t n, const ChannelCoefs&);
  // slope and offset, from the sums of so many values (their share is 1 over that); `scaled`: slope times scale too
  bool (*through)(const double* sum_dy, const double* sum_dy_xmu, double share, bool scaled, std::int64_t n, const ChannelCoefs&);
  // as float32; of every NaN one without a payload
  void (*round)(const double* values, std::int64_t n, float* out);
};

struct Kernels {
  const char* name;
  int vector_bytes;
  ChannelKernels channels;
  Leaf leaf[kDtypes];
  Leaf wide[kDtypes];  // float64 arithmetic on the same data, for magnitudes that float32 coefficients cannot hold
};

const Kernels& kernels_default();
const Kernels& kernels_avx2();    // x86-64 only
const Kernels& kernels_avx512();  // x86-64 only

// The widest set that this processor has and BATCHNORM_CPU_CAPABILITY (default | avx2 | avx512) allows.
const Kernels& kernels();

}  // namespace bn
