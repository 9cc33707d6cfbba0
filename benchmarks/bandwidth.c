/* Reads memory with loads alone, as fast as the machine gives it.
 *
 * Each thread reads a part of the array as several streams side by side, asking for
 * lines ahead of them. The sums are returned so that no load can be left out. */

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define MOST_THREADS 512
#define LINE 64 /* bytes */

typedef uint64_t Lanes __attribute__((vector_size(LINE)));

struct part {
    pthread_t thread;
    const char *start;
    size_t bytes;
    int streams;
    size_t ahead; /* bytes, 0: the hardware alone looks ahead */
    Lanes sum;
};

#define READ(STREAMS, AHEAD)                                                      \
    for (size_t at = 0; at < own; at += LINE)                                     \
        for (int i = 0; i < (STREAMS); i++) {                                     \
            const char *from = part->start + i * own + at;                        \
            if (AHEAD) __builtin_prefetch(from + part->ahead, 0, 3);              \
            sums[i] += *(const Lanes *)from;                                      \
        }

static void *read_part(void *given) {
    struct part *part = given;
    Lanes sums[8] = {{0}};
    size_t own = part->bytes / part->streams / LINE * LINE;
    switch (2 * part->streams + (part->ahead > 0)) {
    case 2: READ(1, 0) break;
    case 3: READ(1, 1) break;
    case 4: READ(2, 0) break;
    case 5: READ(2, 1) break;
    case 8: READ(4, 0) break;
    case 9: READ(4, 1) break;
    case 16: READ(8, 0) break;
    case 17: READ(8, 1) break;
    }
    for (int i = 0; i < 8; i++) part->sum += sums[i];
    return NULL;
}

/* `start` is aligned to 64 bytes; `streams` is 1, 2, 4 or 8. */
uint64_t read_memory(const char *start, size_t bytes, int threads, int streams,
                     size_t ahead) {
    struct part parts[MOST_THREADS];
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    size_t own = bytes / threads / LINE * LINE;
    for (int i = 0; i < threads; i++) {
        parts[i] = (struct part){
            .start = start + i * own, .bytes = own, .streams = streams, .ahead = ahead};
        /* The caller reads the last part itself, and those that get no thread. */
        if (i == threads - 1 ||
            pthread_create(&parts[i].thread, NULL, read_part, &parts[i])) {
            parts[i].thread = pthread_self();
            read_part(&parts[i]);
        }
    }
    uint64_t sum = 0;
    for (int i = 0; i < threads; i++) {
        if (!pthread_equal(parts[i].thread, pthread_self()))
            pthread_join(parts[i].thread, NULL);
        for (size_t j = 0; j < LINE / sizeof(uint64_t); j++) sum += parts[i].sum[j];
    }
    return sum;
}
