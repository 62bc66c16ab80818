// The table of this translation unit's instruction set: every data type with every variant.
#pragma once

namespace bn {
namespace BN_ISA {

template <class T, class A, Variant loop> void fill(Leaf& leaf, Variant slot) {
  using L = Loops<T, A, loop>;
  leaf.apply_line[slot] = &L::apply_line;
  leaf.apply_grid[slot] = &L::apply_grid;
  leaf.reduce_line[slot] = &L::reduce_line;
  leaf.reduce_grid[slot] = &L::reduce_grid;
  leaf.elemt_line[slot] = &L::elemt_line;
  leaf.elemt_grid[slot] = &L::elemt_grid;
}

template <class T, class A> void fill_moments(Leaf& leaf) {
  leaf.widen = &widen_all<T>;
  leaf.narrow = &narrow_all<T>;
  leaf.moments_line = &Moments<T, A>::line;
  leaf.moments_grid = &Moments<T, A>::grid;
}

template <class T, class A> Leaf fast() {
  Leaf leaf;
  if (Unit<T, A>::units > 1) leaf.arrange = [](float* coefs, std::int64_t n) { in_pairs<lanes<float>()>(coefs, n, false); };
  fill_moments<T, A>(leaf);
  fill<T, A, plain>(leaf, plain);
  fill<T, A, relu>(leaf, relu);
  fill<T, A, relu_residual>(leaf, relu_residual);
  fill<T, A, any>(leaf, any);
  fill<T, A, any_masked>(leaf, any_masked);
  return leaf;
}

// One loop for every form: these run for magnitudes beyond 1e30 only.
template <class T> Leaf wide() {
  Leaf leaf;
  fill_moments<T, double>(leaf);
  for (int v = plain; v < any_masked; ++v) fill<T, double, any>(leaf, static_cast<Variant>(v));
  fill<T, double, any_masked>(leaf, any_masked);
  return leaf;
}

inline Kernels make(const char* name) {
  Kernels k;
  k.name = name;
  k.vector_bytes = kBytes;
  k.channels = channel_kernels();
  k.leaf[static_cast<int>(Dtype::f32)] = fast<float, float>();
  k.leaf[static_cast<int>(Dtype::f64)] = fast<double, double>();
  k.leaf[static_cast<int>(Dtype::bf16)] = fast<bf16, float>();
  k.leaf[static_cast<int>(Dtype::f16)] = fast<f16, float>();
  k.wide[static_cast<int>(Dtype::f32)] = wide<float>();
  k.wide[static_cast<int>(Dtype::f64)] = k.leaf[static_cast<int>(Dtype::f64)];
  k.wide[static_cast<int>(Dtype::bf16)] = wide<bf16>();
  k.wide[static_cast<int>(Dtype::f16)] = wide<f16>();
  return k;
}

}  // namespace BN_ISA
}  // namespace bn
