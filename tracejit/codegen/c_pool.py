"""What runs plans, as C: one per process, compiled and loaded once, shared by all plans.

`tj_run_plan` calls a plan's kernels one after another; their tasks run on a pool of threads.

A job is a task and a number of chunks. Each thread takes chunks from a range of its own, then from
the others': a thread that the system does not run delays nobody. Chunks are claimed by
compare-and-swap on a word that carries the job's number, so a thread that wakes late cannot touch a
later job. Workers spin for a short while between jobs and then sleep on a futex-like condition.
A child made by fork starts without workers and makes its own at its first job. A second job that
arrives while one runs (from another Python thread) is done by its caller alone.
"""

POOL_SOURCE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O1") /* half of the time of a first call's compiler; it waits for memory */
#endif

#define MAX_THREADS 256
#define SPINS 16000 /* of a worker before it sleeps; some 400 µs: waking it takes 50 to 100 */
#define WAITS 8000 /* of the caller for chunks that others do before it lets them run */

typedef void (*tj_task)(void *, int64_t);

/* The chunks of one thread in one word, so that they change together: the job's number (32 bits),
   the next chunk (16), the end (16). */
struct range {
  _Atomic uint64_t word;
} __attribute__((aligned(128)));

static struct {
  _Atomic uint64_t job; /* number of the job published last */
  _Atomic(tj_task) task;
  _Atomic(void *) arguments;
  _Atomic uint32_t threads;
  char pad0[64];
  _Atomic uint32_t done; /* chunks of the job that are finished */
  char pad1[64];
  _Atomic uint32_t sleeping;
  _Atomic uint32_t woken; /* how often the workers were told that a job is to come */
  _Atomic bool busy;
  uint32_t workers; /* written by the owner of `busy` only */
  bool watches_fork;
  struct range ranges[MAX_THREADS];
  pthread_mutex_t mutex;
  pthread_cond_t wake;
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Run chunks of a job until none is left: from the range of `self` on, then the others'. */
static void work(uint64_t job, uint32_t self) {
  tj_task task = atomic_load_explicit(&pool.task, memory_order_relaxed);
  void *arguments = atomic_load_explicit(&pool.arguments, memory_order_relaxed);
  uint32_t threads = atomic_load_explicit(&pool.threads, memory_order_relaxed);
  for (uint32_t i = 0; i < threads; i++) {
    struct range *range = &pool.ranges[(self + i) % threads];
    uint64_t word = atomic_load_explicit(&range->word, memory_order_acquire);
    for (;;) {
      uint32_t next = word >> 16 & 0xffff, end = word & 0xffff;
      if (word >> 32 != (job & 0xffffffff) || next >= end) break;
      if (!atomic_compare_exchange_weak_explicit(&range->word, &word, word + 0x10000,
                                                 memory_order_acq_rel, memory_order_acquire))
        continue;
      task(arguments, next);
      atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
      word = atomic_load_explicit(&range->word, memory_order_acquire);
    }
  }
}

static void *worker(void *number) {
  uint32_t self = (uint32_t)(uintptr_t)number;
  uint64_t seen = 0;
  uint32_t woken = 0;
  for (;;) {
    uint64_t job = atomic_load_explicit(&pool.job, memory_order_acquire);
    for (int i = 0; job == seen && i < SPINS; i++) {
      relax();
      job = atomic_load_explicit(&pool.job, memory_order_acquire);
    }
    if (job == seen) {
      pthread_mutex_lock(&pool.mutex);
      atomic_fetch_add(&pool.sleeping, 1);
      while ((job = atomic_load(&pool.job)) == seen && atomic_load(&pool.woken) == woken)
        pthread_cond_wait(&pool.wake, &pool.mutex);
      woken = atomic_load(&pool.woken);
      atomic_fetch_sub(&pool.sleeping, 1);
      pthread_mutex_unlock(&pool.mutex);
      if (job == seen) continue; /* soon */
    }
    seen = job;
    if (self < atomic_load_explicit(&pool.threads, memory_order_relaxed)) work(job, self);
  }
  return 0;
}

/* In a child made by fork: no workers, and nothing that they held. */
static void forget(void) {
  pthread_mutex_init(&pool.mutex, 0);
  pthread_cond_init(&pool.wake, 0);
  pool.workers = 0;
  atomic_store(&pool.sleeping, 0);
  atomic_store(&pool.busy, false);
}

static void start_workers(uint32_t wanted) {
  if (!pool.watches_fork) {
    pthread_atfork(0, 0, forget);
    pool.watches_fork = true;
  }
  while (pool.workers < wanted) {
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int failed =
        pthread_create(&thread, &detached, worker, (void *)(uintptr_t)(pool.workers + 1));
    pthread_attr_destroy(&detached);
    if (failed) return; /* the caller takes their chunks */
    pool.workers++;
  }
}

/* A job will come soon: to wake up takes as long as a small plan. */
void tj_pool_wake(void) {
  if (!atomic_load(&pool.sleeping)) return;
  pthread_mutex_lock(&pool.mutex);
  atomic_fetch_add(&pool.woken, 1);
  pthread_mutex_unlock(&pool.mutex);
  pthread_cond_broadcast(&pool.wake);
}

void tj_pool_launch(tj_task task, void *arguments, int64_t chunks, int64_t threads) {
  bool idle = false;
  if (threads < 2 || chunks > 0xffff ||
      !atomic_compare_exchange_strong(&pool.busy, &idle, true)) {
    for (int64_t chunk = 0; chunk < chunks; chunk++) task(arguments, chunk);
    return;
  }
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  if (threads > chunks) threads = chunks;
  if (pool.workers + 1 < threads) start_workers((uint32_t)threads - 1);
  uint64_t job = atomic_load_explicit(&pool.job, memory_order_relaxed) + 1;
  atomic_store_explicit(&pool.task, task, memory_order_relaxed);
  atomic_store_explicit(&pool.arguments, arguments, memory_order_relaxed);
  atomic_store_explicit(&pool.threads, (uint32_t)threads, memory_order_relaxed);
  atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
  for (int64_t i = 0; i < threads; i++) {
    uint64_t first = i * chunks / threads, end = (i + 1) * chunks / threads;
    atomic_store_explicit(&pool.ranges[i].word, job << 32 | first << 16 | end,
                          memory_order_release);
  }
  atomic_store(&pool.job, job);
  if (atomic_load(&pool.sleeping)) {
    pthread_mutex_lock(&pool.mutex);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
  }
  work(job, 0);
  for (int spins = 0; atomic_load_explicit(&pool.done, memory_order_acquire) < chunks; spins++) {
    relax();
    if (spins > WAITS) sched_yield();
  }
  atomic_store_explicit(&pool.busy, false, memory_order_release);
}

enum { LOOK = 1 << 16 }; /* integers of a chunk */

struct look {
  const void *at;
  int64_t n, size, last;
  _Atomic bool beyond;
};

/* The sign of an integer, or of how far it is from the last one, tells whether it is outside. */
static void look(void *arguments, int64_t chunk) {
  struct look *const at = arguments;
  const int64_t first = chunk * LOOK, end = first + LOOK < at->n ? first + LOOK : at->n;
  bool beyond;
  if (at->size == 8) {
    const uint64_t *const x = at->at, last = (uint64_t)at->last;
    uint64_t signs = 0;
    for (int64_t i = first; i < end; i++) signs |= x[i] | (last - x[i]);
    beyond = signs >> 63;
  } else {
    const uint32_t *const x = at->at, last = (uint32_t)at->last;
    uint32_t signs = 0;
    for (int64_t i = first; i < end; i++) signs |= x[i] | (last - x[i]);
    beyond = signs >> 31;
  }
  if (beyond) atomic_store_explicit(&at->beyond, true, memory_order_relaxed);
}

/* Whether n integers of 4 or 8 bytes lie between 0 and `last`, both included. */
bool tj_pool_within(const void *at, int64_t n, int64_t size, int64_t last, int64_t threads) {
  struct look found = {at, n, size, last, false};
  tj_pool_launch(look, &found, (n + LOOK - 1) / LOOK, threads);
  return !atomic_load(&found.beyond);
}

struct tj_run {
  void (*launch)(tj_task task, void *arguments, int64_t chunks, int64_t threads);
  int64_t threads;
};

struct tj_launch {
  void (*kernel)(const struct tj_run *, void *scratch, void *const *buffers, const double *scalars);
  int64_t buffers, scalars; /* how many of each */
  /* of the first launch of a loop: how often, for how many parts of its rows, which need not wait
     for each other, and how many launches; else 1 */
  int64_t steps, parts, span;
};

struct tj_plan {
  int64_t addresses; /* how many a call has */
  int64_t launches;
  const struct tj_launch *launch;
  const int64_t *slots; /* of each launch: the places of its working memory and its buffers, each
                           the number of an address, bytes from there, and bytes further in each
                           step of a loop and for each of its parts; then of its scalars */
};

struct loop {
  struct tj_run run;
  char *const *addresses;
  const double *scalars;
  const struct tj_launch *launches;
  const int64_t *slots;
};

/* All steps of a part of a loop; what is in no loop is one step of one part. */
static void steps_of(void *arguments, int64_t part) {
  const struct loop *const at = arguments;
  const struct tj_launch *const first = at->launches, *const end = first + first->span;
  for (int64_t step = 0; step < first->steps; step++) {
    const int64_t *slot = at->slots;
    for (const struct tj_launch *launch = first; launch < end; launch++) {
      void *buffers[launch->buffers + 1];
      double scalars[launch->scalars + 1];
      for (int64_t i = 0; i <= launch->buffers; i++, slot += 4)
        buffers[i] = at->addresses[slot[0]] + slot[1] + step * slot[2] + part * slot[3];
      for (int64_t i = 0; i < launch->scalars; i++) scalars[i] = at->scalars[*slot++];
      launch->kernel(&at->run, buffers[0], buffers + 1, scalars);
    }
  }
}

/* Run a plan. A call is made of words: whether it is over, the number of threads, the addresses of
   memory, the plan's scalars. The first is 0 before and -1 after. */
void tj_run_plan(const struct tj_plan *plan, int64_t *call) {
  struct loop at = {
      .run = {tj_pool_launch, call[1]},
      .addresses = (char *const *)(call + 2),
      .scalars = (const double *)(call + 2 + plan->addresses),
      .launches = plan->launch,
      .slots = plan->slots,
  };
  while (at.launches < plan->launch + plan->launches) {
    const struct tj_launch *const end = at.launches + at.launches->span;
    if (at.launches->parts > 1)
      tj_pool_launch(steps_of, &at, at.launches->parts, call[1]);
    else
      steps_of(&at, 0);
    for (; at.launches < end; at.launches++)
      at.slots += 4 * (at.launches->buffers + 1) + at.launches->scalars;
  }
  call[0] = -1;
}
"""
