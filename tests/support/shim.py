# SPDX-License-Identifier: GPL-3.0-or-later
"""A library for LD_PRELOAD that lets the disk fail, the process die at any step, or clocks jump.

Environment variables tell what happens; all calls that change something in the tree are counted
(what is made, opened for writing, renamed, flushed, deleted), from 1 on, a write to a file once,
whether they name it by its path or by a descriptor of its folder, and by the same word:

    SHIM_TREE    the folder, a path without links: nothing outside of it is concerned
    SHIM_KILL    the number of the call before which the process gets SIGKILL
    SHIM_STOP    the same for SIGSTOP: a test may change something meanwhile
    SHIM_FAIL    the number of the call that fails instead, with the error number SHIM_ERRNO
    SHIM_CALL    "flock", "fsync", "write": all calls of that name fail with SHIM_ERRNO
    SHIM_LOG     a file that gets a line of each: the call and the path (of rename: the new one)

    SHIM_NOSIZE  any value: file systems tell neither their size nor what is free (0 of 0)

    SHIM_NFD     NFC/NFD: a name that holds the first is listed with the second and found by both,
                 as by file servers that store names in another Unicode form

    SHIM_TIME    the time at which the process begins, in seconds since 1970
    SHIM_STANDS  it stays this second all the time
    SHIM_JUMP    a file with the number of seconds that all clocks are ahead, now or later; a wait
                 for a socket or lock ends when the clock jumps to its end
"""
import shutil
import subprocess

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int steps;
static __thread char concerned_path[4096];

/* Whether a path, which is kept for the log, is the tree or below it. */
static int inside(const char *path)
{
    const char *tree = getenv("SHIM_TREE");
    size_t length = tree ? strlen(tree) : 0;
    if (path != concerned_path)
        snprintf(concerned_path, sizeof concerned_path, "%s", path ? path : "");
    return length && !strncmp(concerned_path, tree, length)
           && (!concerned_path[length] || concerned_path[length] == '/');
}

/* The same for an open file or folder, by the name that it has now. */
static int inside_fd(int fd)
{
    char link[64];
    snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, concerned_path, sizeof concerned_path - 1);
    concerned_path[length > 0 ? length : 0] = 0;
    return inside(concerned_path);
}

/* The same for a name in an open folder. */
static int at(int fd, const char *name)
{
    if (name[0] == '/')
        return inside(name);
    inside_fd(fd);
    size_t length = strlen(concerned_path);
    snprintf(concerned_path + length, sizeof concerned_path - length, "/%s", name);
    return inside(concerned_path);
}

/* The name as it is on disk. */
static const char *stored(const char *name)
{
    static __thread char paths[2][4096];
    static __thread int turn;
    const char *forms = getenv("SHIM_NFD"), *listed = forms ? strchr(forms, '/') : NULL;
    const char *found = listed && name ? strstr(name, listed + 1) : NULL;
    if (!found)
        return name;
    turn ^= 1;
    snprintf(paths[turn], sizeof paths[turn], "%.*s%.*s%s", (int)(found - name), name,
             (int)(listed - forms), forms, found + strlen(listed + 1));
    return paths[turn];
}

#define READDIR(call, type)                                                            \
    struct type *call(DIR *folder)                                                     \
    {                                                                                  \
        static __thread struct type copy;                                              \
        char first[256] = "";                                                          \
        REAL(call);                                                                    \
        struct type *entry = real(folder);                                             \
        const char *forms = getenv("SHIM_NFD"), *listed = forms ? strchr(forms, '/') : NULL; \
        if (!listed || !entry)                                                         \
            return entry;                                                              \
        snprintf(first, sizeof first, "%.*s", (int)(listed - forms), forms);           \
        char *found = strstr(entry->d_name, first);                                    \
        if (!found)                                                                    \
            return entry;                                                              \
        memcpy(&copy, entry, offsetof(struct type, d_name));                           \
        snprintf(copy.d_name, sizeof copy.d_name, "%.*s%s%s", (int)(found - entry->d_name), \
                 entry->d_name, listed + 1, found + strlen(first));                    \
        return &copy;                                                                  \
    }
READDIR(readdir, dirent)
READDIR(readdir64, dirent64)

#define STATAT(call, type)                                                             \
    int call(int fd, const char *path, struct type *told, int flags)                   \
    {                                                                                  \
        REAL(call);                                                                    \
        return real(fd, stored(path), told, flags);                                    \
    }
#define BY_NAME(result, call, parameters, arguments)                                    \
    result call parameters                                                             \
    {                                                                                  \
        REAL(call);                                                                    \
        return real arguments;                                                         \
    }
BY_NAME(DIR *, opendir, (const char *path), (stored(path)))
BY_NAME(int, stat, (const char *path, struct stat *told), (stored(path), told))
BY_NAME(int, lstat, (const char *path, struct stat *told), (stored(path), told))
BY_NAME(int, stat64, (const char *path, struct stat64 *told), (stored(path), told))
BY_NAME(int, lstat64, (const char *path, struct stat64 *told), (stored(path), told))
STATAT(fstatat, stat)
STATAT(fstatat64, stat64)

static int number(const char *name)
{
    return getenv(name) ? atoi(getenv(name)) : 0;
}

/* 1: the call is to fail. */
static int step(const char *call, int concerned, int counted)
{
    if (!concerned)
        return 0;
    FILE *log = getenv("SHIM_LOG") && counted ? fopen(getenv("SHIM_LOG"), "a") : NULL;
    if (log) {
        fprintf(log, "%s %s\n", call, concerned_path);
        fclose(log);
    }
    int now = counted ? __sync_add_and_fetch(&steps, 1) : -1;
    if (now == number("SHIM_KILL"))
        kill(getpid(), SIGKILL);
    if (now == number("SHIM_STOP"))
        kill(getpid(), SIGSTOP);
    const char *all = getenv("SHIM_CALL");
    if (now != number("SHIM_FAIL") && !(all && !strcmp(all, call)))
        return 0;
    errno = number("SHIM_ERRNO");
    return 1;
}

#define OPEN(call, parameters, arguments, concerned)                                   \
    int call parameters                                                                \
    {                                                                                  \
        va_list list;                                                                  \
        va_start(list, flags);                                                         \
        mode_t mode = va_arg(list, mode_t);                                            \
        va_end(list);                                                                  \
        REAL(call);                                                                    \
        if (flags & O_ACCMODE && step("open", concerned, 1))                           \
            return -1;                                                                 \
        return real arguments;                                                         \
    }
OPEN(open, (const char *path, int flags, ...), (stored(path), flags, mode), at(AT_FDCWD, path))
OPEN(open64, (const char *path, int flags, ...), (stored(path), flags, mode), at(AT_FDCWD, path))
OPEN(openat, (int fd, const char *path, int flags, ...), (fd, stored(path), flags, mode),
     at(fd, path))
OPEN(openat64, (int fd, const char *path, int flags, ...), (fd, stored(path), flags, mode),
     at(fd, path))

ssize_t write(int fd, const void *data, size_t size)
{
    static int last;
    REAL(write);
    int first = fd != last;
    if (size > 0 && inside_fd(fd)) {
        last = fd;
        if (step("write", 1, first))
            return -1;
    }
    return real(fd, data, size);
}

#define SIMPLE(told, call, parameters, arguments, concerned)                           \
    int call parameters                                                                \
    {                                                                                  \
        REAL(call);                                                                    \
        return step(told, concerned, 1) ? -1 : real arguments;                         \
    }
SIMPLE("mkdir", mkdir, (const char *path, mode_t mode), (path, mode), at(AT_FDCWD, path))
SIMPLE("mkdir", mkdirat, (int fd, const char *path, mode_t mode), (fd, stored(path), mode),
       at(fd, path))
SIMPLE("rename", rename, (const char *from, const char *to), (from, to), at(AT_FDCWD, to))
SIMPLE("rename", renameat, (int old, const char *from, int new, const char *to),
       (old, stored(from), new, stored(to)), at(new, to))
SIMPLE("link", link, (const char *from, const char *to), (from, to), at(AT_FDCWD, to))
SIMPLE("link", linkat, (int old, const char *from, int new, const char *to, int flags),
       (old, from, new, to, flags), at(new, to))
SIMPLE("unlink", unlink, (const char *path), (path), at(AT_FDCWD, path))
SIMPLE(flags & AT_REMOVEDIR ? "rmdir" : "unlink", unlinkat,
       (int fd, const char *path, int flags), (fd, stored(path), flags), at(fd, path))
SIMPLE("rmdir", rmdir, (const char *path), (path), at(AT_FDCWD, path))
SIMPLE("fsync", fsync, (int fd), (fd), inside_fd(fd))
SIMPLE("fsync", fdatasync, (int fd), (fd), inside_fd(fd))
SIMPLE("flock", flock, (int fd, int operation), (fd, operation), inside_fd(fd))

#define STATVFS(call, parameters, arguments)                                     \
    int call parameters                                                                \
    {                                                                                  \
        REAL(call);                                                                    \
        int result = real arguments;                                                   \
        if (!result && getenv("SHIM_NOSIZE"))                                          \
            told->f_blocks = told->f_bfree = told->f_bavail = 0;                       \
        return result;                                                                 \
    }
STATVFS(statvfs, (const char *path, struct statvfs *told), (path, told))
STATVFS(fstatvfs, (int fd, struct statvfs *told), (fd, told))
STATVFS(statvfs64, (const char *path, struct statvfs64 *told), (path, told))
STATVFS(fstatvfs64, (int fd, struct statvfs64 *told), (fd, told))

static int jump(clockid_t clock)
{
    int seconds = 0;
    const char *path = getenv("SHIM_JUMP");
    FILE *file = path && (clock == CLOCK_REALTIME || clock == CLOCK_MONOTONIC)
                 ? fopen(path, "r") : NULL;
    if (file) {
        if (fscanf(file, "%d", &seconds) != 1)
            seconds = 0;
        fclose(file);
    }
    return seconds;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static time_t began;
    REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME && getenv("SHIM_TIME")) {
        if (!began || getenv("SHIM_STANDS"))
            began = now->tv_sec;
        now->tv_sec += number("SHIM_TIME") - began;
    }
    now->tv_sec += jump(clock);
    return result;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *rest)
{
    REAL(clock_nanosleep);
    struct timespec real_until = *until;
    if (flags & TIMER_ABSTIME)
        real_until.tv_sec -= jump(clock);
    return real(clock, flags, &real_until, rest);
}

#define SLICE 50  /* milliseconds: so soon a wait notices that the clock jumped */

int poll(struct pollfd *files, nfds_t count, int timeout)
{
    REAL(poll);
    if (!getenv("SHIM_JUMP") || timeout <= 0)
        return real(files, count, timeout);
    int began = jump(CLOCK_MONOTONIC), ready = 0;
    long left = timeout;
    while (!ready && left > 0) {
        ready = real(files, count, left < SLICE ? left : SLICE);
        left -= SLICE;
        if ((jump(CLOCK_MONOTONIC) - began) * 1000L >= left)
            left = 0;
    }
    return ready;
}

/* A wait of so many milliseconds, in slices. `wait` is sem_clockwait or sem_timedwait. */
static int wait_for(sem_t *semaphore, clockid_t clock, long left,
                    int (*wait)(sem_t *, clockid_t, const struct timespec *))
{
    __typeof__(&clock_gettime) real_time
        = (__typeof__(&clock_gettime))dlsym(RTLD_NEXT, "clock_gettime");
    int began = jump(CLOCK_MONOTONIC);
    for (;;) {
        long passed = (jump(CLOCK_MONOTONIC) - began) * 1000L;
        int last = left - passed <= SLICE || !getenv("SHIM_JUMP");
        long slice = left < passed ? 0 : last ? left - passed : SLICE;
        struct timespec end;
        real_time(clock, &end);
        end.tv_sec += slice / 1000;
        end.tv_nsec += slice % 1000 * 1000000;
        if (end.tv_nsec >= 1000000000) {
            end.tv_sec++;
            end.tv_nsec -= 1000000000;
        }
        int result = wait(semaphore, clock, &end);
        if (!result || errno != ETIMEDOUT || last)
            return result;
        left -= slice;
    }
}

static long until_then(const struct timespec *then, struct timespec now)
{
    return (then->tv_sec - now.tv_sec) * 1000L + (then->tv_nsec - now.tv_nsec) / 1000000 + 1;
}

/* Python's locks wait by one of these: by the clock above, or before 3.11 by gettimeofday. */
int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *until)
{
    REAL(sem_clockwait);
    struct timespec now;
    clock_gettime(clock, &now);
    return wait_for(semaphore, clock, until_then(until, now), real);
}

static int timed(sem_t *semaphore, clockid_t clock, const struct timespec *until)
{
    int (*real)(sem_t *, const struct timespec *)
        = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, "sem_timedwait");
    return clock == CLOCK_REALTIME ? real(semaphore, until) : -1;
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until)
{
    struct timeval now;
    gettimeofday(&now, NULL);
    struct timespec then = {now.tv_sec, now.tv_usec * 1000};
    return wait_for(semaphore, CLOCK_REALTIME, until_then(until, then), timed);
}
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The path of the library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler to build the library with that lets the disk fail")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", "shim.so", "shim.c", "-ldl",
                    "-lpthread"], cwd=str(folder), check=True)
    return folder / "shim.so"
