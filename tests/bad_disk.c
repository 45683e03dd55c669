// A disk that misbehaves, for LD_PRELOAD: reads of files whose path contains $BAD_DISK_FILE are slowed down or fail, as
// the control file $BAD_DISK_CONTROL says, which tests change while the program runs. See bad_disk.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

// bad_disk.py has the same fields.
struct control {
    _Atomic int64_t after_bytes;             // all is well until so many bytes were read
    _Atomic int64_t bytes_per_s;             // of all threads together; 0: as fast as it goes
    _Atomic int64_t fail_every;              // each read with a multiple of this number fails; 0: none
    _Atomic int64_t failing_thread;          // all its reads fail; 0: no thread, -1: the next one that reads
    _Atomic int64_t failures_left;           // so many reads may fail; -1: for ever
    _Atomic int64_t reads, bytes, failures;  // what happened so far
};

typedef ssize_t (*preadv_function)(int, const struct iovec*, int, off64_t);

static struct control* control;
static const char* file_name;
static preadv_function next_preadv;
static pthread_mutex_t queue = PTHREAD_MUTEX_INITIALIZER;
static int64_t disk_free_at_ns;

__attribute__((constructor)) static void start(void) {
    next_preadv = (preadv_function)dlsym(RTLD_NEXT, "preadv64");
    file_name = getenv("BAD_DISK_FILE");
    const char* path = getenv("BAD_DISK_CONTROL");
    const int fd = path != NULL && file_name != NULL ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void* mapped = MAP_FAILED;
    if (fd >= 0) {
        mapped = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
    }
    if (mapped == MAP_FAILED) {
        fputs("bad_disk: no control file\n", stderr);
        abort();
    }
    control = mapped;
}

static int is_the_file(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = '\0';
    return strstr(path, file_name) != NULL;
}

static int fails(int64_t number) {
    int64_t next_one = -1;
    const int64_t me = syscall(SYS_gettid);
    if (control->failures_left == 0) {
        return 0;
    }
    atomic_compare_exchange_strong(&control->failing_thread, &next_one, me);
    const int64_t every = control->fail_every;
    if (control->failing_thread != me && (every == 0 || number % every != 0)) {
        return 0;
    }
    int64_t left = control->failures_left;
    while (left > 0 && !atomic_compare_exchange_weak(&control->failures_left, &left, left - 1)) {
    }
    return left != 0;
}

// Waits as long as a disk of that speed would take, which serves one read after the other.
static void take_time(int64_t n, int64_t bytes_per_s) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    pthread_mutex_lock(&queue);
    const int64_t now_ns = now.tv_sec * 1000000000 + now.tv_nsec;
    disk_free_at_ns = (disk_free_at_ns > now_ns ? disk_free_at_ns : now_ns) + n * 1000000000 / bytes_per_s;
    const struct timespec due = {disk_free_at_ns / 1000000000, disk_free_at_ns % 1000000000};
    pthread_mutex_unlock(&queue);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR) {
    }
}

ssize_t preadv64(int fd, const struct iovec* to, int n, off64_t offset) {
    if (!is_the_file(fd)) {
        return next_preadv(fd, to, n, offset);
    }
    const int64_t number = ++control->reads;
    const int bad = control->bytes >= control->after_bytes;
    if (bad && fails(number)) {
        ++control->failures;
        errno = EIO;
        return -1;
    }
    const ssize_t got = next_preadv(fd, to, n, offset);
    if (got > 0) {
        control->bytes += got;
        const int64_t bytes_per_s = control->bytes_per_s;
        if (bad && bytes_per_s > 0) {
            take_time(got, bytes_per_s);
        }
    }
    return got;
}

ssize_t preadv(int fd, const struct iovec* to, int n, off_t offset) { return preadv64(fd, to, n, offset); }
