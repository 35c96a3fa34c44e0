/* Makes fsync and fdatasync FSYNC_MS milliseconds slower for the processes that preload this library, to simulate a slow
 * disk: queues differ in how often they wait for the disk. benchmarks.queue --fsync-ms uses this file.
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
        /* Continue the wait after a signal: PostgreSQL's processes send each other many. */
    }
    return ((int (*)(int))dlsym(RTLD_NEXT, name))(file);
}

int fsync(int file) { return slowly("fsync", file); }

int fdatasync(int file) { return slowly("fdatasync", file); }
