// Digests of consecutive chunks of weights on the GPU: the multilinear sum that
// headrace_checkpoint/digest.py defines. digest.ptx is this file compiled by
//   nvcc -arch=compute_80 -ptx digest.cu
// with its ".version" lowered to 7.0, which has every instruction used, so that older drivers take it.
// digest.fatbin is machine code, so that nothing needs compiling at load time, by CUDA 13.0's
//   nvcc -fatbin -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90
//     -gencode arch=compute_100,code=sm_100 -gencode arch=compute_120,code=sm_120 digest.cu
//
// data: `words` 64-bit words, 16-byte aligned, the last one padded with zero bytes.
// chunk_words: words per chunk, even; the last chunk may be short.
// out:  one 64-bit word per chunk, zero before the launch.
// Launched with gridDim.y chunks, the blocks of gridDim.x share one.
extern "C" __global__ void multilinear64(const unsigned long long* __restrict__ data,
                                         unsigned long long words, unsigned long long chunk_words,
                                         unsigned long long* __restrict__ out) {
  const unsigned long long begin = blockIdx.y * chunk_words;
  const unsigned long long count = words - begin < chunk_words ? words - begin : chunk_words;
  const unsigned long long* chunk = data + begin;
  unsigned long long sum = 0;
  const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
  for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
       2 * i < count; i += stride) {
    unsigned long long pair[2] = {chunk[2 * i], 2 * i + 1 < count ? chunk[2 * i + 1] : 0};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      unsigned long long z = (2 * i + k + 1) * 0x9E3779B97F4A7C15ull;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
      sum += pair[k] * ((z ^ (z >> 31)) | 1ull);
    }
  }
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if ((threadIdx.x & 31) == 0) atomicAdd(out + blockIdx.y, sum);
}
