// The digest of a chunk, the multilinear sum that headrace_checkpoint/digest.py defines. numpy is as
// quick at that, but takes a tenth of a second to import, in which 250 MB can be loaded.
//
// cc -O2 -shared -fPIC digest.c -o digest.so (hatch_build.py)
#include <stddef.h>
#include <stdint.h>

// The multiplier of each of `count` words, splitmix64 of its number made odd.
void headrace_multipliers(uint64_t *multipliers, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    uint64_t z = (i + 1) * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    multipliers[i] = (z ^ (z >> 31)) | 1;
  }
}

uint64_t headrace_digest(const uint64_t *words, const uint64_t *multipliers, size_t count) {
  uint64_t sum = 0;
  for (size_t i = 0; i < count; ++i) sum += words[i] * multipliers[i];
  return sum;
}
