// Memory of large outputs. What one output gives back serves the next of its size: the system would zero the pages of
// a fresh one, at the price of half a copy, and malloc maps large blocks anew each time.
#pragma once

#include <cstddef>

namespace bn {

struct Block {
  void* data;
  std::size_t bytes;
};

// Smaller outputs are torch's: malloc keeps such blocks itself.
constexpr std::size_t kLeastBlock = std::size_t{1} << 20;

// A block of at least so many bytes, huge pages behind it where the system has them; null where there is no memory.
Block* take_block(std::size_t bytes);
void give_block(Block* block);

// Gives idle blocks back to the system. They go by themselves where they were idle for kMostIdleSeconds, or are more
// than BATCHNORM_CACHE_MIB (an eighth of the machine's memory) together; 0 keeps none. Returns the bytes freed.
std::size_t empty_cache();
constexpr int kMostIdleSeconds = 10;

}  // namespace bn
