// Fills the table of this translation unit's instruction set: every data type with every variant.
#pragma once

#include "channels.h"
#include "loops.h"
#include "moments.h"

namespace bn {
namespace BN_ISA {

template <class T, class A, Variant variant> void set_loops(LoopTable& table, Variant entry) {
  using L = Loops<T, A, variant>;
  table.apply_contiguous[entry] = &L::apply_contiguous;
  table.apply_channels_last[entry] = &L::apply_channels_last;
  table.backward_reduce_contiguous[entry] = &L::backward_reduce_contiguous;
  table.backward_reduce_channels_last[entry] = &L::backward_reduce_channels_last;
  table.backward_elemt_contiguous[entry] = &L::backward_elemt_contiguous;
  table.backward_elemt_channels_last[entry] = &L::backward_elemt_channels_last;
}

template <class T, class A> void set_moments(LoopTable& table) {
  table.to_float64 = &to_float64_all<T>;
  table.from_float64 = &from_float64_all<T>;
  table.moments_contiguous = &Moments<T, A>::contiguous;
  table.moments_channels_last = &Moments<T, A>::channels_last;
}

template <class T, class A> LoopTable make_loops() {
  LoopTable table;
  if (MainAccess<T, A>::vectors > 1)
    table.reorder_coefs = [](float* coefs, std::int64_t n) { reorder_even_odd<lanes<float>()>(coefs, n, false); };
  set_moments<T, A>(table);
  set_loops<T, A, plain>(table, plain);
  set_loops<T, A, relu>(table, relu);
  set_loops<T, A, relu_residual>(table, relu_residual);
  set_loops<T, A, generic>(table, generic);
  set_loops<T, A, generic_masked>(table, generic_masked);
  return table;
}

// One loop for all forms but the masked one, because these loops are rare.
template <class T> LoopTable make_float64_loops() {
  LoopTable table;
  set_moments<T, double>(table);
  for (int v = plain; v < generic_masked; ++v) set_loops<T, double, generic>(table, static_cast<Variant>(v));
  set_loops<T, double, generic_masked>(table, generic_masked);
  return table;
}

inline Kernels make_kernels(const char* name) {
  Kernels k;
  k.name = name;
  k.channels = channel_kernels();
  k.loops[static_cast<int>(Dtype::f32)] = make_loops<float, float>();
  k.loops[static_cast<int>(Dtype::f64)] = make_loops<double, double>();
  k.loops[static_cast<int>(Dtype::bf16)] = make_loops<bf16, float>();
  k.loops[static_cast<int>(Dtype::f16)] = make_loops<f16, float>();
  k.float64_loops[static_cast<int>(Dtype::f32)] = make_float64_loops<float>();
  k.float64_loops[static_cast<int>(Dtype::f64)] = k.loops[static_cast<int>(Dtype::f64)];
  k.float64_loops[static_cast<int>(Dtype::bf16)] = make_float64_loops<bf16>();
  k.float64_loops[static_cast<int>(Dtype::f16)] = make_float64_loops<f16>();
  return k;
}

}  // namespace BN_ISA
}  // namespace bn
