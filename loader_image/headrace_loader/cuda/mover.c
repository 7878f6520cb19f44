// A load from the page cache, all of it but deciding what to do: threads fill blocks of pinned
// memory together, piece by piece, and the caller's thread queues the copy of each full block and,
// behind a run, its digests. In Python each piece takes the interpreter's lock several times, which
// ten threads wait for, and starting them takes a tenth of a load of 1 GiB.
//
// Few large blocks: the link loses 2 us at every copy, and what is copied has to be in the CPU's
// cache still. Small pieces: no thread is waited for long, at the begin and at the end above all.
// One thread for the driver: its calls wait for each other, and the first ones of a thread are long.
//
// cc -O2 -shared -fPIC -pthread mover.c -o mover.so (hatch_build.py). It links to no driver: the
// driver's functions are handed in, so that it also loads where there is none.
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { NOT_READY = 600, WORD = 8, SPINS = 1024, YIELDS = 4096, REHEARSALS = 128, LEAST_PIECE = 64 * 1024 };

struct run {  // headrace_loader/cuda/native.py has the same structures
  int64_t offset;
  uint64_t size, pointer, chunk_bytes, digests;
  uint64_t left;  // bytes whose copies are not queued
  int32_t file, done;
};

struct slot {
  char *buffer;
  void *event;
  struct run *run;  // the block that is in it: `size` bytes of a run from `begin` on
  uint64_t begin, size;
  uint64_t left;  // bytes that are not read, and 1 until they are copied; 0 is an empty slot
  int copying;
  char apart[64];
};

struct load {
  int (*event_query)(void *event);
  int (*event_record)(void *event, void *stream);
  int (*stream_wait)(void *stream, void *event, unsigned flags);
  int (*copy_to_device)(uint64_t pointer, const void *source, size_t size, void *stream);
  int (*launch)(void *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
                void *stream, void **arguments, void **extra);
  void *kernel, *copies, *digests;
  struct run *runs;
  struct slot *slots;
  uint64_t run_count, slot_count, thread_count, slot_bytes, piece_bytes, blocks, threads;
  char apart[64];  // what all wait for shares no cache line with what all read
  uint64_t locked, next_run, next_begin, next_bytes, opened, taken, all_open;  // changed by who has the lock
  char apart_too[64];
  uint64_t running, started, woken, ready, begun, moved, failed, released, present;
};

const uint64_t headrace_sizes[] = {sizeof(struct load), sizeof(struct run), sizeof(struct slot)};  // for native.py

struct piece {
  struct slot *slot;
  uint64_t begin, size;  // within the slot
};

// Sleeps only after a millisecond or so: nothing here takes longer, and to wake up takes a tenth of
// it. Before that it lets others run, where there are fewer CPUs than threads.
static void wait_a_little(unsigned *spins) {
  if (++*spins > SPINS + YIELDS) nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
  else if (*spins > SPINS) sched_yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");
#endif
}

static uint64_t load_of(const uint64_t *value) { return __atomic_load_n(value, __ATOMIC_ACQUIRE); }

// Opens the next block, in the slot that has waited longest. Everybody waits meanwhile, for there is
// nothing else to do. Returns 0 if there is none, or on failure.
static int open_block(struct load *load) {
  while (load->next_run < load->run_count && load->next_begin == load->runs[load->next_run].size) {
    ++load->next_run;
    load->next_begin = 0;
  }
  if (load->next_run == load->run_count) {
    __atomic_store_n(&load->all_open, 1, __ATOMIC_RELEASE);
    return 0;
  }
  struct slot *slot = &load->slots[load->opened % load->slot_count];
  for (unsigned spins = 0; load_of(&slot->left); wait_a_little(&spins))
    if (load_of(&load->failed)) return 0;
  __atomic_store_n(&load->opened, load->opened + 1, __ATOMIC_RELEASE);
  slot->run = &load->runs[load->next_run];
  slot->begin = load->next_begin;
  slot->size = slot->run->size - slot->begin;
  if (slot->size > load->next_bytes) slot->size = load->next_bytes;
  __atomic_store_n(&slot->left, slot->size + 1, __ATOMIC_RELEASE);
  load->next_begin += slot->size;
  load->next_bytes = load->next_bytes * 2 < load->slot_bytes ? load->next_bytes * 2 : load->slot_bytes;
  load->taken = 0;
  return 1;
}

// Hands out the next piece; in small blocks pieces are so small that all threads get one.
static int take(struct load *load, struct piece *piece) {
  for (unsigned spins = 0; load_of(&load->locked) || __atomic_exchange_n(&load->locked, 1, __ATOMIC_ACQUIRE);)
    wait_a_little(&spins);
  int found = !load_of(&load->failed);
  if (found && (!load->opened || load->taken == load->slots[(load->opened - 1) % load->slot_count].size))
    found = open_block(load);
  if (found) {
    struct slot *slot = &load->slots[(load->opened - 1) % load->slot_count];
    uint64_t size = (slot->size / load->thread_count / LEAST_PIECE + 1) * LEAST_PIECE;
    if (size > load->piece_bytes) size = load->piece_bytes;
    if (size > slot->size - load->taken) size = slot->size - load->taken;
    *piece = (struct piece){slot, load->taken, size};
    load->taken += size;
  }
  __atomic_store_n(&load->locked, 0, __ATOMIC_RELEASE);
  return found;
}

static int read_piece(const struct piece *piece) {
  const struct run *run = piece->slot->run;
  char *buffer = piece->slot->buffer + piece->begin;
  int64_t offset = run->offset + (int64_t)(piece->slot->begin + piece->begin);
  for (size_t filled = 0; filled < piece->size;) {
    ssize_t got = pread(run->file, buffer + filled, piece->size - filled, offset + (int64_t)filled);
    if (got > 0) filled += (size_t)got;
    else if (got == 0 || errno != EINTR) return 1;
  }
  return 0;
}

static int queue_digests(const struct load *load, const struct run *run) {
  uint64_t words = (run->size + WORD - 1) / WORD, chunk_words = run->chunk_bytes / WORD;
  uint64_t chunks = (run->size + run->chunk_bytes - 1) / run->chunk_bytes;
  uint64_t pointer = run->pointer, digests = run->digests;
  void *arguments[] = {&pointer, &words, &chunk_words, &digests};
  return load->launch(load->kernel, (unsigned)load->blocks, (unsigned)chunks, 1, (unsigned)load->threads, 1, 1, 0,
                      load->digests, arguments, NULL);
}

// The last word of a run is padded with zeros. Copies have a stream of their own: behind a kernel
// they would wait for it.
static int queue_block(struct load *load, struct slot *slot) {
  struct run *run = slot->run;
  uint64_t padded = (slot->size + WORD - 1) / WORD * WORD;
  memset(slot->buffer + slot->size, 0, padded - slot->size);
  if (load->copy_to_device(run->pointer + slot->begin, slot->buffer, padded, load->copies)) return 1;
  if (load->event_record(slot->event, load->copies)) return 1;
  slot->copying = 1;
  run->left -= slot->size;
  if (run->left) return 0;
  if (load->stream_wait(load->digests, slot->event, 0) || queue_digests(load, run)) return 1;
  run->done = 1;
  __atomic_add_fetch(&load->moved, run->size, __ATOMIC_RELAXED);
  return 0;
}

// Empties the slot that the next block goes to once its copy is done. Returns 1 on failure.
static int empty_next(struct load *load) {
  struct slot *slot = &load->slots[load_of(&load->opened) % load->slot_count];
  if (!slot->copying) return 0;
  int code = load->event_query(slot->event);
  if (code) return code != NOT_READY;
  slot->copying = 0;
  __atomic_store_n(&slot->left, 0, __ATOMIC_RELEASE);
  return 0;
}

// Queues blocks as they get full, and returns when all are queued, or on failure.
static int queue_all(struct load *load) {
  uint64_t queued = 0;
  for (unsigned spins = 0; !load_of(&load->failed); wait_a_little(&spins)) {
    for (uint64_t n = 0; n < load->slot_count; ++n) {
      struct slot *slot = &load->slots[n];
      if (load_of(&slot->left) != 1 || slot->copying) continue;
      if (queue_block(load, slot)) return 1;
      ++queued;
      spins = 0;
    }
    if (load_of(&load->all_open) && queued == load->opened) return 0;
    if (empty_next(load)) return 1;
  }
  return 1;
}

static int read_all(struct load *load) {
  struct piece piece;
  while (take(load, &piece)) {
    if (read_piece(&piece)) return 1;
    __atomic_sub_fetch(&piece.slot->left, piece.size, __ATOMIC_RELEASE);
  }
  return 0;
}

static void fail(struct load *load) { __atomic_store_n(&load->failed, 1, __ATOMIC_RELEASE); }

// Reads what will be read last into a thread's share of all slots, as often as there is time before
// the load begins. First reads are half as fast: of a core that slept, of caches that do not have the
// slots, of memory that nobody used.
static void rehearse(const struct load *load, uint64_t thread) {
  const struct run *run = &load->runs[load->run_count - 1];
  uint64_t share = load->slot_bytes / load->thread_count, size = share < run->size ? share : run->size;
  for (uint64_t n = 0; n < REHEARSALS * load->slot_count && !load_of(&load->woken); ++n)
    if (pread(run->file, load->slots[n % load->slot_count].buffer + thread * share, size, run->offset) <= 0) return;
}

static void *work_beside(void *given) {
  struct load *load = given;
  rehearse(load, __atomic_fetch_add(&load->started, 1, __ATOMIC_RELAXED));
  for (unsigned spins = 0; !load_of(&load->woken);) wait_a_little(&spins);
  __atomic_add_fetch(&load->ready, 1, __ATOMIC_RELEASE);
  for (unsigned spins = 0; !load_of(&load->begun);) wait_a_little(&spins);
  if (read_all(load)) fail(load);
  __atomic_sub_fetch(&load->running, 1, __ATOMIC_RELEASE);
  for (unsigned spins = 0; !load_of(&load->released);) wait_a_little(&spins);
  __atomic_sub_fetch(&load->present, 1, __ATOMIC_RELEASE);
  return NULL;
}

// Starts the threads that read. headrace_load has to follow, and headrace_release: they wait for it.
void headrace_prepare(struct load *load) {
  for (uint64_t n = 0; n < load->run_count; ++n) load->runs[n].left = load->runs[n].size;
  pthread_attr_t detached;
  if (pthread_attr_init(&detached)) return;
  pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
  for (uint64_t n = 0; n < load->thread_count; ++n) {
    pthread_t thread;
    __atomic_add_fetch(&load->present, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&load->running, 1, __ATOMIC_RELAXED);
    if (pthread_create(&thread, &detached, work_beside, load)) {
      __atomic_sub_fetch(&load->present, 1, __ATOMIC_RELAXED);
      __atomic_sub_fetch(&load->running, 1, __ATOMIC_RELAXED);
      break;
    }
  }
  pthread_attr_destroy(&detached);
}

// Returns when all threads are there and none sleeps, or would for a millisecond.
void headrace_wake(struct load *load) {
  __atomic_store_n(&load->woken, 1, __ATOMIC_RELEASE);
  for (unsigned spins = 0; load_of(&load->ready) < load_of(&load->running);) wait_a_little(&spins);
}

// Moves all runs, in the thread's current context, and returns when their copies and digests are
// queued. A run that is not `done` afterwards has to be moved again, by what can tell why it failed:
// its digests are not queued, and some of its copies may be. Nothing is read any more.
void headrace_load(struct load *load) {
  if (!load_of(&load->running)) return;  // no thread could be started
  headrace_wake(load);
  __atomic_store_n(&load->begun, 1, __ATOMIC_RELEASE);
  if (queue_all(load)) fail(load);
  for (unsigned spins = 0; load_of(&load->running);) wait_a_little(&spins);
}

// Ends the threads, which stay awake until what was queued is done: the caches of a core that falls
// asleep are emptied first, and what the last copies read is in there.
void headrace_release(struct load *load) {
  __atomic_store_n(&load->released, 1, __ATOMIC_RELEASE);
  for (unsigned spins = 0; load_of(&load->present);) wait_a_little(&spins);
}
