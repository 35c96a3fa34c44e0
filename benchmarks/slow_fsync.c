/* Makes fsync and fdatasync FSYNC_MS milliseconds slower in every process that preloads this library. benchmarks.queue
 * --fsync-ms uses this library to simulate a slow disk, because queues differ in how often they wait for the disk.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <time.h>

static int slowly(const char *name, int file) {
    const char *given = getenv("FSYNC_MS");
    const long microseconds = given ? (long)(1000.0 * atof(given)) : 0;
    struct timespec wait = {microseconds / 1000000, microseconds % 1000000 * 1000};
    while (nanosleep(&wait, &wait) && errno == EINTR) {
        /* Keep waiting after a signal, because PostgreSQL's processes send each other many signals. */
    }
    return ((int (*)(int))dlsym(RTLD_NEXT, name))(file);
}

int fsync(int file) { return slowly("fsync", file); }

int fdatasync(int file) { return slowly("fdatasync", file); }
