// A stand-in for libcuda.so.1, the GPU driver's library, where there is no GPU: device memory is
// host memory. What is queued is done as late as the driver may do it, when somebody waits for it,
// so that a buffer that is used again too early shows. FAKE_CUDA_FAIL="call:code" lets a call fail,
// "call:code:n" the n-th one alone.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint64_t u64;
enum { INVALID = 1, NOT_READY = 600, PAGE = 2 << 20 };

struct work {
  struct work *next;
  u64 to, from, size, chunk_words, chunks;
  enum { COPY, CLEAR, DIGEST, WAIT } kind;
};
struct stream { struct work *first, **last; u64 queued, done; };
struct event { struct stream *stream; u64 at; int asked; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread void *current;
static struct { char *begin; size_t size; } pinned[64];
static int pins, context;

static int fault(const char *call) {
  static int calls;
  const char *told = getenv("FAKE_CUDA_FAIL");
  size_t length = strlen(call);
  if (!told || strncmp(told, call, length) || told[length] != ':') return 0;
  char *rest;
  int code = (int)strtol(told + length + 1, &rest, 10);
  return *rest != ':' || ++calls == atoi(rest + 1) ? code : 0;
}
#define CALL(...) \
  int code = fault(__func__); \
  if (code) return code
#define IN_CONTEXT() \
  CALL(); \
  if (!current) return 201

static u64 splitmix64(u64 i) {
  u64 z = (i + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

static void advance(struct stream *stream, u64 until);

static void perform(const struct work *work) {
  if (work->kind == WAIT) advance((struct stream *)work->from, work->size);
  if (work->kind == COPY) memcpy((void *)work->to, (void *)work->from, work->size);
  if (work->kind == CLEAR) memset((void *)work->to, 0, work->size);
  if (work->kind != DIGEST) return;
  const u64 *word = (const u64 *)work->from;
  for (u64 n = 0; n < work->size; ++n) {
    u64 chunk = n / work->chunk_words;
    if (chunk < work->chunks) ((u64 *)work->to)[chunk] += word[n] * (splitmix64(n % work->chunk_words) | 1);
  }
}

static void advance(struct stream *stream, u64 until) {
  while (stream->done < until) {
    struct work *work = stream->first;
    perform(work);
    stream->first = work->next;
    if (!stream->first) stream->last = &stream->first;
    free(work);
    ++stream->done;
  }
}

static int queue(struct stream *stream, struct work work) {
  if (!current) return 201;
  struct work *kept = malloc(sizeof work);
  *kept = work;
  pthread_mutex_lock(&lock);
  *stream->last = kept;
  stream->last = &kept->next;
  ++stream->queued;
  pthread_mutex_unlock(&lock);
  return 0;
}

int cuInit(unsigned flags) {
  CALL();
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  return flags || !visible || !*visible || strchr(visible, ',') ? INVALID : 0;  // a process sees one GPU
}
int cuGetErrorName(int code, const char **name) {
  *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN";
  return 0;
}
int cuDeviceGet(int *device, int ordinal) { CALL(); *device = 0; return ordinal ? 101 : 0; }
int cuDeviceGetUuid_v2(char *uuid, int device) {
  CALL();
  for (int i = 0; i < 16; ++i) uuid[i] = (char)i;
  return device;
}
int cuDeviceGetPCIBusId(char *name, int size, int device) {
  CALL();
  snprintf(name, (size_t)size, "0000:ff:1f.7");
  return device;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  CALL();
  *value = attribute == 110;
  return device;
}
int cuDevicePrimaryCtxRetain(void **made, int device) { CALL(); *made = &context; return device; }
int cuCtxSetCurrent(void *now) { CALL(); current = now; return 0; }
int cuCtxSynchronize(void) { IN_CONTEXT(); return 0; }
int cuMemGetInfo_v2(size_t *left, size_t *total) { CALL(); *left = *total = PAGE; return 0; }
int cuMemGetAllocationGranularity(size_t *bytes, const void *properties, int option) {
  CALL();
  *bytes = PAGE;
  return properties && option == 1 ? 0 : INVALID;
}
int cuMemCreate(u64 *handle, size_t size, const int *properties, u64 flags) {
  CALL();
  // Pinned, exported as a file descriptor, on a device.
  if (size % PAGE || properties[0] != 1 || properties[1] != 1 || properties[2] != 1 || flags) return INVALID;
  if (((const unsigned char *)properties)[25] != 1) return INVALID;  // gpuDirectRDMACapable, as attribute 110 says
  int file = memfd_create("fake-cuda", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, (off_t)size)) return 2;
  *handle = (u64)file;
  return 0;
}
int cuMemExportToShareableHandle(int *file, u64 handle, int kind, u64 flags) {
  CALL();
  *file = dup((int)handle);
  return kind == 1 && !flags && *file >= 0 ? 0 : INVALID;
}
int cuMemRelease(u64 handle) { CALL(); return close((int)handle) ? INVALID : 0; }
int cuMemAddressReserve(u64 *address, size_t size, size_t alignment, u64 wish, u64 flags) {
  CALL();
  void *found = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *address = (u64)found;
  return found == MAP_FAILED ? 2 : alignment || wish || flags ? INVALID : 0;
}
int cuMemMap(u64 address, size_t size, size_t offset, u64 handle, u64 flags) {
  CALL();
  void *found = mmap((void *)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)handle, (off_t)offset);
  return found == MAP_FAILED || flags ? INVALID : 0;
}
int cuMemSetAccess(u64 address, size_t size, const int *access, size_t count) {
  CALL();
  int protection = access[2] == 3 ? PROT_READ | PROT_WRITE : PROT_READ;
  return count == 1 && !mprotect((void *)address, size, protection) ? 0 : INVALID;
}
int cuMemUnmap(u64 address, size_t size) { CALL(); return munmap((void *)address, size) ? INVALID : 0; }
int cuMemAddressFree(u64 address, size_t size) { CALL(); return address && size ? 0 : INVALID; }
int cuMemHostRegister_v2(void *begin, size_t size, unsigned flags) {
  IN_CONTEXT();
  pinned[pins].begin = begin;
  pinned[pins++].size = size;
  return flags ? INVALID : 0;
}
int cuMemAlloc_v2(u64 *pointer, size_t size) { IN_CONTEXT(); *pointer = (u64)malloc(size); return 0; }
int cuMemFree_v2(u64 pointer) { IN_CONTEXT(); free((void *)pointer); return 0; }
int cuMemsetD8_v2(u64 pointer, unsigned char value, size_t size) {
  IN_CONTEXT();
  memset((void *)pointer, value, size);
  return 0;
}
int cuStreamCreate(void **made, unsigned flags) {
  IN_CONTEXT();
  struct stream *stream = calloc(1, sizeof *stream);
  stream->last = &stream->first;
  *made = stream;
  return flags == 1 ? 0 : INVALID;
}
int cuStreamSynchronize(void *stream) {
  IN_CONTEXT();
  pthread_mutex_lock(&lock);
  advance(stream, ((struct stream *)stream)->queued);
  pthread_mutex_unlock(&lock);
  return 0;
}
int cuMemcpyHtoDAsync_v2(u64 to, const char *from, size_t size, void *stream) {
  CALL();
  for (int i = 0; i < pins; ++i)
    if (from >= pinned[i].begin && from + size <= pinned[i].begin + pinned[i].size)
      return queue(stream, (struct work){.to = to, .from = (u64)from, .size = size, .kind = COPY});
  return INVALID;
}
int cuMemHostAlloc(void **made, size_t size, unsigned flags) {
  IN_CONTEXT();
  *made = malloc(size);
  return flags ? INVALID : 0;
}
int cuMemFreeHost(void *begin) { IN_CONTEXT(); free(begin); return 0; }
int cuMemcpyDtoHAsync_v2(char *to, u64 from, size_t size, void *stream) {
  CALL();
  return queue(stream, (struct work){.to = (u64)to, .from = from, .size = size, .kind = COPY});
}
int cuMemsetD8Async(u64 pointer, unsigned char value, size_t size, void *stream) {
  CALL();
  return value ? INVALID : queue(stream, (struct work){.to = pointer, .size = size, .kind = CLEAR});
}
int cuEventCreate(void **made, unsigned flags) {
  IN_CONTEXT();
  *made = calloc(1, sizeof(struct event));
  return flags == 2 ? 0 : INVALID;
}
int cuEventRecord(struct event *event, struct stream *stream) {
  IN_CONTEXT();
  *event = (struct event){stream, stream->queued, 0};
  return 0;
}
int cuStreamWaitEvent(struct stream *stream, struct event *event, unsigned flags) {
  IN_CONTEXT();
  if (flags) return INVALID;
  if (!event->stream) return 0;
  return queue(stream, (struct work){.kind = WAIT, .from = (u64)event->stream, .size = event->at});
}
int cuEventQuery(struct event *event) {
  IN_CONTEXT();
  if (!event->stream || event->stream->done >= event->at) return 0;
  if (!event->asked++) return NOT_READY;
  pthread_mutex_lock(&lock);
  advance(event->stream, event->at);
  pthread_mutex_unlock(&lock);
  return 0;
}
int cuModuleLoadData(void **module, const void *image) { IN_CONTEXT(); *module = &context; return image ? 0 : INVALID; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  CALL();
  *function = module;
  return strcmp(name, "multilinear64") ? 500 : 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
  CALL();
  if (function != &context || !x || z != 1 || threads % 32 || ty != 1 || tz != 1 || shared || extra) return INVALID;
  u64 *value[4];
  for (int i = 0; i < 4; ++i) value[i] = arguments[i];
  if (*value[0] % 16) return INVALID;
  return queue(stream, (struct work){.kind = DIGEST, .from = *value[0], .size = *value[1],
                                     .chunk_words = *value[2], .to = *value[3], .chunks = y});
}
