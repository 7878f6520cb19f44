// The inner loop of a load from the page cache: read into pinned buffers in turn, queue the copies.
// In Python each piece takes the interpreter's lock several times, which ten threads wait for.
//
// cc -O2 -shared -fPIC mover.c -o mover.so (hatch_build.py). It links to nothing: the driver's
// functions are handed in, so that it also runs where there is no driver.
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BUFFERS = 2, NOT_READY = 600, WORD = 8, SPINS = 4096 };

struct lane {
  int (*event_query)(void *event);
  int (*event_record)(void *event, void *stream);
  int (*copy_to_device)(uint64_t pointer, const void *source, size_t size, void *stream);
  void *stream;
  char *buffer[BUFFERS];
  void *event[BUFFERS];
  size_t piece;
  size_t next;  // the buffer to use
};

static int wait_for(const struct lane *lane, size_t slot) {
  for (int spins = 0;; ++spins) {
    int code = lane->event_query(lane->event[slot]);
    if (code != NOT_READY) return code;
    if (spins > SPINS) nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
  }
}

// Moves `size` bytes at `offset` of a file to `pointer`, padded with zeros to whole words. Returns
// 0; else what failed has to be found by doing it again, piece by piece.
int headrace_move(struct lane *lane, int file, int64_t offset, size_t size, uint64_t pointer) {
  for (size_t done = 0; done < size;) {
    size_t count = size - done < lane->piece ? size - done : lane->piece, filled = 0;
    size_t slot = lane->next, padded = (count + WORD - 1) / WORD * WORD;
    if (wait_for(lane, slot)) return 1;
    char *buffer = lane->buffer[slot];
    while (filled < count) {
      ssize_t got = pread(file, buffer + filled, count - filled, offset + (int64_t)(done + filled));
      if (got > 0) filled += (size_t)got;
      else if (got == 0 || errno != EINTR) return 1;
    }
    memset(buffer + count, 0, padded - count);
    if (lane->copy_to_device(pointer + done, buffer, padded, lane->stream)) return 1;
    if (lane->event_record(lane->event[slot], lane->stream)) return 1;
    lane->next = (slot + 1) % BUFFERS;
    done += count;
  }
  return 0;
}
