# SPDX-License-Identifier: GPL-3.0-or-later
"""A library for LD_PRELOAD that lets the disk fail, the process die at any step, or clocks jump.

Environment variables tell what happens; all calls that change something in the tree are counted
(what is made, opened for writing, renamed, flushed, deleted), from 1 on, a write to a file once:

    SHIM_TREE    the folder: nothing outside of it is concerned
    SHIM_KILL    the number of the call before which the process gets SIGKILL
    SHIM_FAIL    the number of the call that fails instead, with the error number SHIM_ERRNO
    SHIM_CALL    "flock", "fsync", "write": all calls of that name fail with SHIM_ERRNO
    SHIM_LOG     a file that gets a line of each: the call and the path (of rename: the new one)

    SHIM_TIME    the time at which the process begins, in seconds since 1970
    SHIM_STANDS  it stays this second all the time
    SHIM_JUMP    a file with the number of seconds that all clocks are ahead, now or later
"""
import shutil
import subprocess

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int steps;
static __thread char concerned_path[4096];

static int inside(const char *path)
{
    const char *tree = getenv("SHIM_TREE");
    snprintf(concerned_path, sizeof concerned_path, "%s", path ? path : "");
    return tree && path && !strncmp(path, tree, strlen(tree));
}

static int inside_fd(int fd)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length > 0 ? length : 0] = 0;
    return inside(path);
}

static int at(int fd, const char *path)
{
    return path[0] == '/' || fd == AT_FDCWD ? inside(path) : inside_fd(fd);
}

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
    const char *all = getenv("SHIM_CALL");
    if (now != number("SHIM_FAIL") && !(all && !strcmp(all, call)))
        return 0;
    errno = number("SHIM_ERRNO");
    return 1;
}

#define OPEN(name)                                                                     \
    int name(const char *path, int flags, ...)                                         \
    {                                                                                  \
        va_list list;                                                                  \
        va_start(list, flags);                                                         \
        mode_t mode = va_arg(list, mode_t);                                            \
        va_end(list);                                                                  \
        REAL(name);                                                                    \
        if (flags & O_ACCMODE && step("open", inside(path), 1))                        \
            return -1;                                                                 \
        return real(path, flags, mode);                                                \
    }
OPEN(open)
OPEN(open64)

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

#define SIMPLE(call, parameters, arguments, concerned)                                 \
    int call parameters                                                                \
    {                                                                                  \
        REAL(call);                                                                    \
        return step(#call, concerned, 1) ? -1 : real arguments;                        \
    }
SIMPLE(mkdir, (const char *path, mode_t mode), (path, mode), inside(path))
SIMPLE(rename, (const char *from, const char *to), (from, to), inside(to))
SIMPLE(unlink, (const char *path), (path), inside(path))
SIMPLE(unlinkat, (int fd, const char *path, int flags), (fd, path, flags), at(fd, path))
SIMPLE(rmdir, (const char *path), (path), inside(path))
SIMPLE(fsync, (int fd), (fd), inside_fd(fd))
SIMPLE(flock, (int fd, int operation), (fd, operation), inside_fd(fd))

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
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The path of the library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler to build the library with that lets the disk fail")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", "shim.so", "shim.c", "-ldl"],
                   cwd=str(folder), check=True)
    return folder / "shim.so"
