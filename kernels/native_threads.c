/* The team of threads that computes; see native.h. */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"

enum { START_SPINS = 8000, BARRIER_SPINS = 4000, MOST_THREADS = 256 };

static struct {
    pthread_mutex_t busy;
    int helpers;
    struct job *job;
    _Alignas(64) atomic_uint round;
    atomic_int asleep;
} team = {.busy = PTHREAD_MUTEX_INITIALIZER};

INLINE void pause_briefly(void) {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

void barrier(struct job *job) {
    if (job->members == 1) {
        atomic_store(&job->next, 0);
        return;
    }
    unsigned turn = atomic_load(&job->turn);
    if (atomic_fetch_add(&job->arrived, 1) + 1 == job->members) {
        atomic_store(&job->arrived, 0);
        atomic_store(&job->next, 0);
        atomic_store(&job->turn, turn + 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&job->turn, memory_order_acquire) == turn; spins++) {
        if (spins < BARRIER_SPINS) pause_briefly();
        else sched_yield();
    }
}

static void *help(void *start) {
    unsigned seen = (unsigned)(uintptr_t)start;
    for (;;) {
        int spins = 0;
        while (atomic_load_explicit(&team.round, memory_order_acquire) == seen) {
            if (++spins < START_SPINS) {
                pause_briefly();
                continue;
            }
            atomic_fetch_add(&team.asleep, 1);
            syscall(SYS_futex, &team.round, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            atomic_fetch_sub(&team.asleep, 1);
        }
        seen++;
        /* The job lies on the caller's stack until all have passed its last barrier; what is left
         * of that barrier for us is a look at `turn`, so the caller waits for `arrived` as well. */
        struct job *job = team.job;
        job->body(job);
        atomic_fetch_add(&job->arrived, 1);
    }
    return NULL;
}

static void forget_helpers(void) { /* in a forked child: threads are not inherited */
    team.helpers = 0;
    team.asleep = 0;
    pthread_mutex_init(&team.busy, NULL);
}

static void hire(int wanted) {
    static int hooked;
    if (!hooked++) pthread_atfork(NULL, NULL, forget_helpers);
    for (; team.helpers < wanted; team.helpers++) {
        pthread_t thread;
        void *start = (void *)(uintptr_t)atomic_load(&team.round);
        if (pthread_create(&thread, NULL, help, start)) return;
        pthread_detach(thread);
    }
}

/* Run body(job) on `threads` threads, this one included. A body must end with a barrier. */
void run(struct job *job, int threads) {
    job->members = 1;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads < 2 || pthread_mutex_trylock(&team.busy)) {
        job->body(job);
        return;
    }
    hire(threads - 1);
    job->members = team.helpers + 1; /* helpers that exist take part in every round */
    team.job = job;
    atomic_fetch_add(&team.round, 1);
    if (atomic_load(&team.asleep))
        syscall(SYS_futex, &team.round, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    job->body(job);
    for (int spins = 0; atomic_load(&job->arrived) < team.helpers; spins++) {
        if (spins < BARRIER_SPINS) pause_briefly();
        else sched_yield();
    }
    pthread_mutex_unlock(&team.busy);
}
