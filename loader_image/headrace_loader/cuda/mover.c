// A load from the page cache, all of it but deciding what to do: threads take runs in turn, read
// them into pinned buffers, queue the copies and, behind them, the digests. In Python each piece
// takes the interpreter's lock several times, which ten threads wait for, and starting them takes
// a tenth of a load of 1 GiB.
//
// cc -O2 -shared -fPIC -pthread mover.c -o mover.so (hatch_build.py). It links to no driver: the
// driver's functions are handed in, so that it also loads where there is none.
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BUFFERS = 2, NOT_READY = 600, WORD = 8, SPINS = 4096, FIRST_PIECE = 256 * 1024, MOST_THREADS = 512 };

struct run {  // headrace_loader/cuda/native.py has the same structures
  int64_t offset;
  uint64_t size, pointer, chunk_bytes, digests;
  int32_t file, done;
};

struct lane {
  void *stream;
  char *buffer[BUFFERS];
  void *event[BUFFERS];
};

struct load {
  int (*context_use)(void *context);
  int (*event_query)(void *event);
  int (*event_record)(void *event, void *stream);
  int (*copy_to_device)(uint64_t pointer, const void *source, size_t size, void *stream);
  int (*launch)(void *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
                void *stream, void **arguments, void **extra);
  void *context, *kernel;
  struct run *runs;
  struct lane *lanes;
  uint64_t run_count, lane_count, piece, blocks, threads;
  uint64_t next_run, next_lane, moved, failed;  // changed here, by all threads
};

static int wait_for(const struct load *load, void *event) {
  for (int spins = 0;; ++spins) {
    int code = load->event_query(event);
    if (code != NOT_READY) return code;
    if (spins > SPINS) nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
  }
}

static int read_all(const struct run *run, uint64_t begin, char *buffer, size_t size) {
  for (size_t filled = 0; filled < size;) {
    ssize_t got = pread(run->file, buffer + filled, size - filled, run->offset + (int64_t)(begin + filled));
    if (got > 0) filled += (size_t)got;
    else if (got == 0 || errno != EINTR) return 1;
  }
  return 0;
}

static int queue_digests(const struct load *load, const struct lane *lane, const struct run *run) {
  uint64_t words = (run->size + WORD - 1) / WORD, chunk_words = run->chunk_bytes / WORD;
  uint64_t chunks = (run->size + run->chunk_bytes - 1) / run->chunk_bytes;
  uint64_t pointer = run->pointer, digests = run->digests;
  void *arguments[] = {&pointer, &words, &chunk_words, &digests};
  return load->launch(load->kernel, (unsigned)load->blocks, (unsigned)chunks, 1, (unsigned)load->threads, 1, 1, 0,
                      lane->stream, arguments, NULL);
}

// The first pieces are small, so that the link is idle for the time of a small read only. The last
// word of a run is padded with zeros.
static int move(struct load *load, const struct lane *lane, const struct run *run, uint64_t *piece, size_t *slot) {
  for (uint64_t done = 0, count; done < run->size; done += count) {
    count = run->size - done < *piece ? run->size - done : *piece;
    uint64_t padded = (count + WORD - 1) / WORD * WORD;
    char *buffer = lane->buffer[*slot];
    void *event = lane->event[*slot];
    if (wait_for(load, event) || read_all(run, done, buffer, count)) return 1;
    memset(buffer + count, 0, padded - count);
    if (load->copy_to_device(run->pointer + done, buffer, padded, lane->stream)) return 1;
    if (load->event_record(event, lane->stream)) return 1;
    *slot = (*slot + 1) % BUFFERS;
    *piece = *piece * 2 < load->piece ? *piece * 2 : load->piece;
  }
  return queue_digests(load, lane, run);
}

static void *work(void *given) {
  struct load *load = given;
  const struct lane *lane = &load->lanes[__atomic_fetch_add(&load->next_lane, 1, __ATOMIC_RELAXED)];
  uint64_t piece = load->piece < FIRST_PIECE ? load->piece : FIRST_PIECE;
  size_t slot = 0;
  int failed = load->context_use(load->context);
  while (!failed && !__atomic_load_n(&load->failed, __ATOMIC_RELAXED)) {
    uint64_t index = __atomic_fetch_add(&load->next_run, 1, __ATOMIC_RELAXED);
    if (index >= load->run_count) return NULL;
    struct run *run = &load->runs[index];
    failed = move(load, lane, run, &piece, &slot);
    if (failed) break;
    run->done = 1;
    __atomic_add_fetch(&load->moved, run->size, __ATOMIC_RELAXED);
  }
  __atomic_store_n(&load->failed, 1, __ATOMIC_RELAXED);
  return NULL;
}

// Moves all runs and returns when their copies and digests are queued. A run that is not `done`
// afterwards has to be moved again, by what can tell why it failed: its digests are not queued.
void headrace_load(struct load *load) {
  pthread_t others[MOST_THREADS];
  size_t started = 0;
  while (started + 1 < load->lane_count && started < MOST_THREADS && !pthread_create(&others[started], NULL, work, load))
    ++started;
  work(load);  // alone, if there are no others
  while (started) pthread_join(others[--started], NULL);
}
