// The activations and their derivatives, on vectors. A NaN goes through all of them, as in torch.
#pragma once

namespace bn {
namespace BN_ISA {

// e^x for x <= 0, within 1.5 units in the last place; 0 below -87.7, where it would be no normal number.
BN_INLINE VF exp_negative(VF x) {
  const VF least = spread(-88.02f);  // there n is -127, and so the power of two 0
  x = x < least ? least : x;
  const VF magic = spread(12582912.0f);  // 1.5·2^23: adding it rounds to an integer in the low bits
  const VF shifted = x * 1.44269504f + magic;
  const VF n = shifted - magic;
  const VF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VF p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VI power = (bits<VI>(shifted) - bits<VI>(magic) + 127) << 23;
  return p * bits<VF>(power);
}
BN_INLINE VD exp_negative(VD x) {
  for (int i = 0; i < lanes<double>(); ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class X> BN_INLINE X magnitude(X x) { return x < 0 ? -x : x; }

template <class X> BN_INLINE X sigmoid(X z) {
  const X e = exp_negative(-magnitude(z));
  return (z < 0 ? e : e * 0 + 1) / (e + 1);
}

BN_INLINE VF hyperbolic_tangent(VF z) {
  const VF size = magnitude(z), e = exp_negative(size * -2.0f), s = z * z;
  const VF far = (1.0f - e) / (1.0f + e);
  VF p = spread(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const VF near = p * s * z + z;  // 1 - e cancels where z is small
  return size < 0.625f ? near : (z < 0 ? -far : far);
}
BN_INLINE VD hyperbolic_tangent(VD z) {
  for (int i = 0; i < lanes<double>(); ++i) z[i] = std::tanh(z[i]);
  return z;
}

template <class A> BN_INLINE V<A> activate(Act act, V<A> z, A negative_slope) {
  const V<A> zero = {};
  switch (act) {
    case Act::none: return z;
    case Act::relu: return rectified(z);
    case Act::relu6: return z < 0 ? zero : (z > 6 ? zero + 6 : z);
    case Act::leaky_relu: return z < 0 ? z * negative_slope : z;
    case Act::silu: return z * sigmoid(z);
    case Act::hardswish: {
      const V<A> t = z + 3;
      return z * ((t < 0 ? zero : (t > 6 ? zero + 6 : t)) / 6);  // z·6 could overflow
    }
    case Act::sigmoid: return sigmoid(z);
    case Act::tanh: return hyperbolic_tangent(z);
  }
  return z;
}

// grad · d activation / dz. At a kink torch's choice: 0 at a ReLU's zero.
template <class A> BN_INLINE V<A> activate_backward(Act act, V<A> z, V<A> grad, A negative_slope) {
  const V<A> zero = {};
  switch (act) {
    case Act::none: return grad;
    case Act::relu: return z <= 0 ? zero : grad;
    case Act::relu6: return z <= 0 ? zero : (z >= 6 ? zero : grad);
    case Act::leaky_relu: return z > 0 ? grad : grad * negative_slope;
    case Act::silu: {
      const V<A> e = exp_negative(-magnitude(z)), small = e / (e + 1), big = 1 / (e + 1);
      return grad * ((z < 0 ? small : big) * (1 + z * (z < 0 ? big : small)));
    }
    case Act::hardswish: return z <= -3 ? zero : (z >= 3 ? grad : grad * (z / 3 + static_cast<A>(0.5)));
    case Act::sigmoid: {
      const V<A> e = exp_negative(-magnitude(z));
      return grad * (e / ((e + 1) * (e + 1)));
    }
    case Act::tanh: {  // 1 - tanh² would cancel for large z
      const V<A> e = exp_negative(-2 * magnitude(z));
      return grad * (4 * e / ((e + 1) * (e + 1)));
    }
  }
  return grad;
}

}  // namespace BN_ISA
}  // namespace bn
