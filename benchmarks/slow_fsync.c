/* A disk that takes FSYNC_MS milliseconds longer to say that something is written, for the processes that preload this:
 * the waits are what queues differ in, and few machines at hand have a slow disk. benchmarks.queue --fsync-ms uses it.
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
        /* PostgreSQL's processes send each other signals all the time; the rest of the wait is still to come. */
    }
    return ((int (*)(int))dlsym(RTLD_NEXT, name))(file);
}

int fsync(int file) { return slowly("fsync", file); }

int fdatasync(int file) { return slowly("fdatasync", file); }
