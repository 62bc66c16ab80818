// Times the CPU kernels without torch, allocation or Python, in nanoseconds of one thread for 16 values.
//   benchmarks/kernels_alone.sh N C S LAST THREADS RELU RESIDUAL DTYPE COLD
// DTYPE: 0 float32, 1 float64, 2 bfloat16, 3 float16.
// COLD 1: before each call other data evict the tensors from the caches, as the other layers of a network do.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels/blocks.h"
#include "kernels/problem.h"

namespace {

using namespace bn;

// The second thread spins between the calls, because the time to wake a thread is not measured here.
struct Helper {
  std::atomic<int> asked{0}, done{0};
  void (*body)(std::int64_t, std::int64_t, void*) = nullptr;
  std::int64_t begin = 0, end = 0;
  void* context = nullptr;
  void work() {
    for (int turn = 1;; ++turn) {
      while (asked.load(std::memory_order_acquire) < turn) {}
      body(begin, end, context);
      done.store(turn, std::memory_order_release);
    }
  }
};

Helper& helper() {
  static Helper* const one = [] {
    auto* made = new Helper;
    std::thread([made] { made->work(); }).detach();
    return made;
  }();
  return *one;
}

void run_two(std::int64_t count, void (*body)(std::int64_t, std::int64_t, void*), void* context) {
  Helper& h = helper();
  const std::int64_t share = (count + 1) / 2;
  h.body = body, h.begin = share, h.end = count, h.context = context;
  const int turn = h.asked.load() + 1;
  h.asked.store(turn, std::memory_order_release);
  body(0, share, context);
  while (h.done.load(std::memory_order_acquire) < turn) {}
}

void run_one(std::int64_t count, void (*body)(std::int64_t, std::int64_t, void*), void* context) {
  body(0, count, context);
}

void evict(const ThreadPool& pool) {
  constexpr std::int64_t share = 32 << 20;
  static std::vector<char> other(2 * share);
  pool.parallel_for(
      2,
      [](std::int64_t begin, std::int64_t end, void* context) {
        for (std::int64_t i = begin * share; i < end * share; i += 64) ++static_cast<char*>(context)[i];
      },
      other.data());
}

template <class F> double median(std::int64_t runs, const F& f, const ThreadPool* cold) {
  std::vector<double> taken;
  for (std::int64_t i = 0; i <= runs; ++i) {
    if (cold) evict(*cold);
    const auto start = std::chrono::steady_clock::now();
    f();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (i) taken.push_back(seconds.count());
  }
  std::nth_element(taken.begin(), taken.begin() + static_cast<std::ptrdiff_t>(taken.size() / 2), taken.end());
  return taken[taken.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const auto word = [&](int i, long otherwise) { return i < argc ? std::atol(argv[i]) : otherwise; };
  Problem p;
  p.n = word(1, 32), p.c = word(2, 64), p.s = word(3, 3136), p.channels_last = word(4, 0);
  const ThreadPool pool{static_cast<int>(word(5, 1)), word(5, 1) > 1 ? &run_two : &run_one};
  p.activation = word(6, 1) ? Activation::relu : Activation::none;
  p.dtype = static_cast<Dtype>(word(8, 0));
  const std::int64_t values = p.n * p.c * p.s;
  const std::size_t bytes = static_cast<std::size_t>(values) * size_of(p.dtype);
  const LoopTable& loops = kernels().loops[static_cast<int>(p.dtype)];
  std::vector<double> numbers(static_cast<std::size_t>(values));
  unsigned seed = 1;
  void* tensors[5];  // x, grad, residual, out, grad_residual
  for (void*& tensor : tensors) {
    for (double& v : numbers) v = static_cast<double>((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1;
    tensor = take_block(bytes)->data;
    loops.from_float64(numbers.data(), values, tensor);
  }
  const std::size_t c = static_cast<std::size_t>(p.c);
  std::vector<double> mean(c), var(c), weight(c, 1.5), bias(c, 0.1), dy(c), dyx(c);
  double count = 0;
  p.x = tensors[0], p.out = tensors[3], p.residual = word(7, 0) ? tensors[2] : nullptr;
  p.mean = mean.data(), p.var = var.data(), p.count = &count, p.weight = weight.data(), p.bias = bias.data(),
  p.eps = 1e-5;
  const ThreadPool* const cold = word(9, 0) ? &pool : nullptr;
  const std::int64_t runs = std::clamp<std::int64_t>(50'000'000 / values, 5, 100);
  const auto show = [&](const char* name, double seconds) {
    std::printf("%s %.2f  ", name, seconds * 1e9 * pool.threads * 16 / static_cast<double>(values));
    return seconds;
  };
  struct Copy {
    char *to, *from;
    std::size_t share;
  } copy{static_cast<char*>(tensors[3]), static_cast<char*>(tensors[0]), bytes / 2};
  const auto copy_share = [](std::int64_t begin, std::int64_t end, void* context) {
    const auto* c = static_cast<const Copy*>(context);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::size_t offset = static_cast<std::size_t>(i) * c->share;
      std::memcpy(c->to + offset, c->from + offset, c->share);
    }
  };
  const double unit = show("copy", median(runs, [&] { pool.parallel_for(2, copy_share, &copy); }, cold));
  show("stats", median(runs, [&] { stats(p, pool); }, cold));
  show("apply", median(runs, [&] { apply(p, pool); }, cold));
  const double there = show("forward", median(runs, [&] { forward(p, pool); }, cold));
  p.grad = tensors[1], p.sum_dy = dy.data(), p.sum_dy_xmu = dyx.data();
  if (p.residual) p.grad_residual = tensors[4];
  show("backward_reduce", median(runs, [&] { backward_reduce(p, pool); }, cold));
  show("backward_elemt", median(runs, [&] { backward_elemt(p, pool); }, cold));
  const double back = show("backward", median(runs, [&] { backward(p, pool); }, cold));
  std::printf("| forward + backward %.2f copies\n", (there + back) / unit);
  return 0;
}
