// Memory of large outputs. A block that one output frees is reused by the next output of its size. Otherwise malloc
// maps a large block anew each time, and the system sets its pages to zero, which costs half of a copy.
#pragma once

#include <cstddef>

namespace bn {

struct Block {
  void* data;
  std::size_t bytes;
};

// Smaller outputs are allocated by torch: malloc reuses blocks of that size itself.
constexpr std::size_t kMinBlockBytes = std::size_t{1} << 20;

// A block of at least `bytes` bytes, in huge pages where the system has them. Null: there is no memory.
Block* take_block(std::size_t bytes);
void give_block(Block* block);

// Returns all idle blocks to the system; the result is the number of bytes. Blocks are also returned, when a block is
// taken or given, after kMaxIdleSeconds, or while all idle blocks together exceed BATCHNORM_CACHE_MIB (default: an
// eighth of the machine's memory). BATCHNORM_CACHE_MIB=0 keeps none.
std::size_t empty_cache();
constexpr int kMaxIdleSeconds = 10;

}  // namespace bn
