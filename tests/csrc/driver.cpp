// Calls every kernel with many shapes, layouts, types, masks and numbers of threads, without torch, for the sanitizers.
// Buffers have no spare bytes and start at odd addresses, so the sanitizers see every access beyond an end. Moments are
// compared with a plain loop in float64. All results are compared with those of one thread, bit for bit.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/blocks.h"
#include "kernels/problem.h"

namespace {

using namespace bn;

int threads_in_use = 1;

void run_threads(std::int64_t count, void (*body)(std::int64_t, std::int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  const std::int64_t share = (count + threads_in_use - 1) / threads_in_use;
  for (std::int64_t begin = 0; begin < count; begin += share)
    threads.emplace_back(body, begin, begin + share < count ? begin + share : count, context);
  for (auto& t : threads) t.join();
}

// Exactly `n` values of a type. They begin one element after the address that the allocator aligned.
struct Buffer {
  Buffer(Dtype type, std::int64_t n)
      : type(type), n(n), raw(new char[(static_cast<std::size_t>(n) + 1) * size_of(type)]) {
    std::memset(raw.get(), 0, (static_cast<std::size_t>(n) + 1) * size_of(type));
  }
  void* data() const { return raw.get() + size_of(type); }
  void fill(unsigned seed) const {
    std::vector<double> values(static_cast<std::size_t>(n));
    for (auto& v : values) {
      seed = seed * 1664525u + 1013904223u;
      v = static_cast<double>(seed >> 8) / (1 << 23) - 0.7;
    }
    kernels().loops[static_cast<int>(type)].from_float64(values.data(), n, data());
  }
  std::vector<double> values() const {
    std::vector<double> v(static_cast<std::size_t>(n));
    kernels().loops[static_cast<int>(type)].to_float64(data(), n, v.data());
    return v;
  }
  Dtype type;
  std::int64_t n;
  std::unique_ptr<char[]> raw;
};

void require(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "driver: %s\n", what.c_str());
  std::exit(1);
}

struct Case {
  std::int64_t n, c, s, slice;
  bool last, masked, residual;
  Dtype type;
  Activation activation;
};

// forward in place and the backward from its output. Both are compared with the results out of place.
std::vector<double> run_in_place(const Case& k, Problem p, const ThreadPool& pool, const std::vector<double>& want_out,
                                 const std::vector<double>& want_dx) {
  Buffer x(k.type, k.n * k.c * k.s), dx(k.type, x.n);
  x.fill(1);
  const void* const grad = p.grad;
  p.x = p.out = x.data(), p.grad = nullptr;
  forward(p, pool);
  require(want_out == x.values(), "in place differs from forward");
  p.grad = grad, p.out = dx.data(), p.in_place = true;
  backward(p, pool);
  const double rounding = k.type == Dtype::f64 ? 1e-9 : k.type == Dtype::f32 ? 1e-4 : 0.2;
  const auto found = dx.values();
  for (std::size_t i = 0; i < found.size(); ++i)
    require(std::fabs(found[i] - want_dx[i]) < rounding * (1 + std::fabs(want_dx[i])), "backward from the output");
  return found;
}

std::vector<std::vector<double>> run_case(const Case& k, int threads) {
  threads_in_use = threads;
  ThreadPool pool;
  pool.threads = threads;
  pool.parallel_for = &run_threads;
  const std::int64_t all = k.n * k.c * k.s;
  Buffer x(k.type, all), grad(k.type, all), residual(k.type, all), out(k.type, all), dx(k.type, all), dr(k.type, all);
  x.fill(1), grad.fill(2), residual.fill(3);
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(k.n * k.s));
  for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = i % 5 != 2;
  std::vector<double> weight(static_cast<std::size_t>(k.c), 1.5), bias(static_cast<std::size_t>(k.c), 0.25);
  Problem p;
  p.dtype = k.type, p.channels_last = k.last, p.n = k.n, p.c = k.c, p.s = k.s, p.slice_size = k.slice;
  p.x = x.data(), p.out = out.data();
  p.residual = k.residual ? residual.data() : nullptr;
  p.valid_mask = k.masked ? mask.data() : nullptr;
  p.weight = weight.data(), p.bias = bias.data(), p.eps = 1e-3, p.activation = k.activation, p.negative_slope = 0.1;
  const std::size_t rows = static_cast<std::size_t>(p.slices()), moments = rows * static_cast<std::size_t>(k.c);
  std::vector<double> mean(moments), var(moments), count(rows), dy(moments), dyx(moments);
  p.mean = mean.data(), p.var = var.data(), p.count = count.data(), p.sum_dy = dy.data(), p.sum_dy_xmu = dyx.data();
  forward(p, pool);
  const auto forward_out = out.values();
  stats(p, pool);
  apply(p, pool);
  require(forward_out == out.values(), "apply differs from forward");
  p.grad = grad.data(), p.out = dx.data(), p.grad_residual = k.residual ? dr.data() : nullptr;
  backward(p, pool);
  const auto grad_input = dx.values();
  backward_reduce(p, pool);
  backward_elemt(p, pool);
  require(grad_input == dx.values(), "backward_elemt differs from backward");
  std::vector<double> in_place;
  if (!k.masked && !k.residual && (k.activation == Activation::none || k.activation == Activation::leaky_relu))
    in_place = run_in_place(k, p, pool, forward_out, grad_input);
  return {forward_out, mean, var, count, grad_input, dr.values(), dy, dyx, in_place};
}

// Mean and variance of channel 0 of the first slice, from the definition.
void check_moments(const Case& k, const std::vector<std::vector<double>>& found) {
  Buffer x(k.type, k.n * k.c * k.s);
  x.fill(1);
  const auto v = x.values();
  const std::int64_t n = k.slice ? std::min(k.slice, k.n) : k.n;
  double sum = 0, square = 0, count = 0;
  for (int pass = 0; pass < 2; ++pass)
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < k.s; ++j) {
        if (k.masked && (i * k.s + j) % 5 == 2) continue;
        const double value = v[static_cast<std::size_t>(k.last ? (i * k.s + j) * k.c : i * k.c * k.s + j)];
        if (pass == 0) sum += value, count += 1;
        else square += (value - sum / count) * (value - sum / count);
      }
  require(count == found[3][0], "count");
  require(std::fabs(found[1][0] - sum / count) < 1e-12, "mean");
  require(std::fabs(found[2][0] - square / count) < 1e-12, "variance");
}

void require_same_bits(const std::vector<std::vector<double>>& one, const std::vector<std::vector<double>>& other) {
  for (std::size_t i = 0; i < one.size(); ++i)
    require(one[i].empty() || !std::memcmp(one[i].data(), other[i].data(), one[i].size() * sizeof(double)),
            "threads change a bit");
}

// Several threads take and give blocks at the same time. Two blocks in use never share memory.
void check_blocks() {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t] {
      for (int i = 0; i < 50; ++i) {
        const std::size_t bytes = kMinBlockBytes + static_cast<std::size_t>(i % 3) * 65536;
        Block* const block = take_block(bytes);
        require(block && block->bytes >= bytes, "no block");
        std::memset(block->data, t, bytes);
        require(static_cast<char*>(block->data)[bytes - 1] == t, "two tensors in one block");
        give_block(block);
      }
    });
  for (auto& thread : threads) thread.join();
  require(empty_cache() > 0 && empty_cache() == 0, "blocks are given back once");
}

}  // namespace

int main() {
  const std::int64_t shapes[][3] = {{3, 5, 1},     {7, 33, 1},  {2, 3, 49},   {5, 40, 9},
                                    {1, 1, 20011}, {9, 17, 31}, {130, 12, 64}};
  int cases = 0;
  for (const auto& shape : shapes)
    for (const bool last : {false, true})
      for (const std::int64_t slice : {0, 2})
        for (const bool masked : {false, true})
          for (const bool residual : {false, true})
            for (const Dtype type : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16}) {
              const Activation acts[] = {Activation::relu, Activation::none, Activation::silu, Activation::leaky_relu,
                                         Activation::tanh};  // the cases take turns
              const bool large = shape[0] > 100;             // for the threads
              if (large && (slice || residual || type == Dtype::f16)) continue;
              const Case k{shape[0], shape[1], shape[2], slice,          last && shape[1] > 1,
                           masked,   residual, type,     acts[cases % 5]};
              const auto one = run_case(k, 1);
              check_moments(k, one);
              const auto three = run_case(k, 3);
              require_same_bits(one, three);
              ++cases;
            }
  // larger than the last-level cache: here outputs use stream stores and the next channel is prefetched
  for (const bool last : {false, true})
    for (const bool residual : {false, true}) {
      const Case k{
          20, 32, 10007, 0, last, false, residual, Dtype::f32, residual ? Activation::relu : Activation::leaky_relu};
      const auto one = run_case(k, 1);
      check_moments(k, one);
      const auto two = run_case(k, 2);
      require_same_bits(one, two);
      ++cases;
    }
  check_blocks();
  std::printf("%d cases on %s\n", cases, kernels().name);
  return 0;
}
