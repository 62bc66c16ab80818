// The activations on vectors: for each its value and its gradient. A NaN passes through all of them, as in torch.
#pragma once

#include "float64.h"

namespace bn {
namespace BN_ISA {

template <class X> BN_INLINE X absolute(X x) { return x < 0 ? -x : x; }

// e^x for x <= 0. The error is at most 1.5 units in the last place. Below -87.7, where e^x is subnormal, the result is
// 0.
BN_INLINE VF exp_negative(VF x) {
  const VF minimum = broadcast(-88.02f);  // there n is -127, which makes the power of two 0
  x = x < minimum ? minimum : x;
  const VF magic = broadcast(12582912.0f);  // 1.5·2^23: the addition rounds to an integer in the low bits
  const VF shifted = x * 1.44269504f + magic;
  const VF n = shifted - magic;
  const VF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VF p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VI power = (bit_cast<VI>(shifted) - bit_cast<VI>(magic) + 127) << 23;
  return p * bit_cast<VF>(power);
}
BN_INLINE VD exp_negative(VD x) {
  for (int i = 0; i < lanes<double>(); ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class X> BN_INLINE X logistic(X z) {
  const X e = exp_negative(-absolute(z));
  return (z < 0 ? e : e * 0 + 1) / (e + 1);
}

BN_INLINE VF hyperbolic_tangent(VF z) {
  const VF size = absolute(z), e = exp_negative(size * -2.0f), s = z * z;
  const VF from_exp = (1.0f - e) / (1.0f + e);
  VF p = broadcast(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const VF polynomial = p * s * z + z;  // for small z, where 1 - e cancels
  return size < 0.625f ? polynomial : (z < 0 ? -from_exp : from_exp);
}
BN_INLINE VD hyperbolic_tangent(VD z) {
  for (int i = 0; i < lanes<double>(); ++i) z[i] = std::tanh(z[i]);
  return z;
}

template <class A> BN_INLINE V<A> activate(Activation activation, V<A> z, A negative_slope) {
  const V<A> zero = {};
  switch (activation) {
    case Activation::none: return z;
    case Activation::relu: return max_with_zero(z);
    case Activation::relu6: return z < 0 ? zero : (z > 6 ? zero + 6 : z);
    case Activation::leaky_relu: return z < 0 ? z * negative_slope : z;
    case Activation::silu: return z * logistic(z);
    case Activation::hardswish: {
      const V<A> t = z + 3;
      return z * ((t < 0 ? zero : (t > 6 ? zero + 6 : t)) / 6);  // z * t first could overflow
    }
    case Activation::sigmoid: return logistic(z);
    case Activation::tanh: return hyperbolic_tangent(z);
  }
  return z;
}

// grad · d activation / dz. Where the derivative does not exist it is torch's: 0 at the zero of a ReLU.
template <class A> BN_INLINE V<A> activate_backward(Activation activation, V<A> z, V<A> grad, A negative_slope) {
  const V<A> zero = {};
  switch (activation) {
    case Activation::none: return grad;
    case Activation::relu: return z <= 0 ? zero : grad;
    case Activation::relu6: return z <= 0 ? zero : (z >= 6 ? zero : grad);
    case Activation::leaky_relu: return z > 0 ? grad : grad * negative_slope;
    case Activation::silu: {
      const V<A> e = exp_negative(-absolute(z)), small = e / (e + 1), large = 1 / (e + 1);
      return grad * ((z < 0 ? small : large) * (1 + z * (z < 0 ? large : small)));
    }
    case Activation::hardswish: return z <= -3 ? zero : (z >= 3 ? grad : grad * (z / 3 + static_cast<A>(0.5)));
    case Activation::sigmoid: {
      const V<A> e = exp_negative(-absolute(z));
      return grad * (e / ((e + 1) * (e + 1)));
    }
    case Activation::tanh: {  // 1 - tanh² would cancel for large z
      const V<A> e = exp_negative(-2 * absolute(z));
      return grad * (4 * e / ((e + 1) * (e + 1)));
    }
  }
  return grad;
}

}  // namespace BN_ISA
}  // namespace bn
