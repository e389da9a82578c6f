/* Count operations that change files below one folder, and at a chosen one kill the process or let it fail.
 *
 * Loaded with LD_PRELOAD. Does nothing until fault_arm() is called. The plan lies in a file that is mapped by all
 * forked processes, so that they count together and the test can read it after a kill.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { CONTENT = 1, NAME = 2, REMOVAL = 4 };       /* write, sync, cut | create, rename | delete */
enum action { NOTHING, KILL, HALF_THEN_KILL, FAIL };

struct plan {
    long counts[3];                                     /* operations seen of each kind */
    long reached;                                       /* operations counted towards `at` */
    char what[512];                                     /* the operation that was hit */
    long at;
    int kinds, action, error, sticky;
    pid_t leader;
    char root[PATH_MAX];
};

static struct plan *plan;

int fault_arm(const char *file, const char *root, long at, int kinds, int action, int error, int sticky) {
    int descriptor = open(file, O_RDWR | O_CREAT, 0600);
    if (descriptor < 0 || ftruncate(descriptor, sizeof *plan)) return -1;
    struct plan *made = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (made == MAP_FAILED) return -1;
    close(descriptor);
    made->at = at, made->kinds = kinds, made->action = action, made->error = error, made->sticky = sticky;
    made->leader = getpid();
    snprintf(made->root, sizeof made->root, "%s", root);
    plan = made;
    return 0;
}

static void die(void) {
    kill(plan->leader, SIGKILL);
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* 0: go on; 1: fail, errno is set; 2: do half, then die(). */
static int hit(int kind, const char *name, const char *path) {
    size_t length = strlen(plan->root);
    if (strncmp(path, plan->root, length) || path[length] != '/') return 0;
    __atomic_add_fetch(&plan->counts[kind / 2], 1, __ATOMIC_SEQ_CST);
    if (!(kind & plan->kinds)) return 0;
    long now = __atomic_add_fetch(&plan->reached, 1, __ATOMIC_SEQ_CST);
    if (!plan->at || now < plan->at || (now > plan->at && !plan->sticky)) return 0;
    if (now == plan->at) snprintf(plan->what, sizeof plan->what, "%s %.480s", name, path + length + 1);
    if (plan->action == KILL) die();
    errno = plan->error;
    return plan->action == FAIL ? 1 : 2;
}

static int descriptor_hit(int kind, const char *name, int descriptor) {
    char link[64], path[PATH_MAX];
    if (!plan) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return hit(kind, name, path);
}

static int path_hit(int kind, const char *name, int folder, const char *path) {
    char whole[2 * PATH_MAX], link[64];
    if (!plan || !path) return 0;
    if (path[0] == '/') return hit(kind, name, path);
    int before = errno;
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, whole, PATH_MAX);
    errno = before;
    if (length < 0) return 0;
    snprintf(whole + length, PATH_MAX, "/%s", path);
    return hit(kind, name, whole);
}

static void *found_once(void **real, const char *name) {
    if (!*real) *real = dlsym(RTLD_NEXT, name);
    return *real;
}

#define REAL(name) ((__typeof__(&name))found_once(&real, #name))

/* A function without half: it fails or is passed on. */
#define PASS(type, name, signature, arguments, check, failed)                                                          \
    type name signature {                                                                                              \
        static void *real;                                                                                             \
        int found = check;                                                                                             \
        if (found == 2) die();                                                                                         \
        return found ? failed : REAL(name) arguments;                                                                  \
    }

/* Writes `half` of the data before the process dies. */
#define WRITE(type, name, signature, arguments, half)                                                                  \
    type name signature {                                                                                              \
        static void *real;                                                                                             \
        int found = descriptor_hit(CONTENT, #name, fd);                                                                \
        if (found == 2) { (void)!REAL(name) half; die(); }                                                             \
        return found ? -1 : REAL(name) arguments;                                                                      \
    }

WRITE(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n), (fd, data, n / 2))
WRITE(ssize_t, pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at), (fd, data, n / 2, at))
WRITE(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at), (fd, data, n / 2, at))
WRITE(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, v, n / 2))
WRITE(ssize_t, sendfile, (int fd, int in, off_t *at, size_t n), (fd, in, at, n), (fd, in, at, n > 65536 ? n / 2 : 0))
WRITE(ssize_t, sendfile64, (int fd, int in, off64_t *at, size_t n), (fd, in, at, n), (fd, in, at, 0))
PASS(ssize_t, copy_file_range, (int in, off64_t *a, int fd, off64_t *b, size_t n, unsigned f), (in, a, fd, b, n, f),
     descriptor_hit(CONTENT, "copy_file_range", fd), -1)
PASS(int, fsync, (int fd), (fd), descriptor_hit(CONTENT, "fsync", fd), -1)
PASS(int, fdatasync, (int fd), (fd), descriptor_hit(CONTENT, "fdatasync", fd), -1)
PASS(int, ftruncate, (int fd, off_t n), (fd, n), descriptor_hit(CONTENT, "ftruncate", fd), -1)
PASS(int, ftruncate64, (int fd, off64_t n), (fd, n), descriptor_hit(CONTENT, "ftruncate", fd), -1)

PASS(int, rename, (const char *from, const char *to), (from, to), path_hit(NAME, "rename", AT_FDCWD, to), -1)
PASS(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to),
     path_hit(NAME, "rename", b, to), -1)
PASS(int, renameat2, (int a, const char *from, int b, const char *to, unsigned f), (a, from, b, to, f),
     path_hit(NAME, "renameat2", b, to), -1)
PASS(int, link, (const char *from, const char *to), (from, to), path_hit(NAME, "link", AT_FDCWD, to), -1)
PASS(int, symlink, (const char *from, const char *to), (from, to), path_hit(NAME, "symlink", AT_FDCWD, to), -1)
PASS(int, mkdir, (const char *path, mode_t mode), (path, mode), path_hit(NAME, "mkdir", AT_FDCWD, path), -1)
PASS(int, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), path_hit(NAME, "mkdir", at, path), -1)

PASS(int, unlink, (const char *path), (path), path_hit(REMOVAL, "unlink", AT_FDCWD, path), -1)
PASS(int, unlinkat, (int at, const char *path, int f), (at, path, f), path_hit(REMOVAL, "unlink", at, path), -1)
PASS(int, remove, (const char *path), (path), path_hit(REMOVAL, "unlink", AT_FDCWD, path), -1)
PASS(int, rmdir, (const char *path), (path), path_hit(REMOVAL, "rmdir", AT_FDCWD, path), -1)

#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name, signature, at, arguments)                                                                           \
    int name signature {                                                                                               \
        static void *real;                                                                                             \
        va_list list;                                                                                                  \
        va_start(list, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;                                        \
        va_end(list);                                                                                                  \
        int found = CHANGES(flags) ? path_hit(NAME, "open", at, path) : 0;                                             \
        if (found == 2) die();                                                                                         \
        return found ? -1 : REAL(name) arguments;                                                                      \
    }

OPEN(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), at, (at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), at, (at, path, flags, mode))

#define WRITES(mode) (strpbrk(mode, "wa+") != NULL)
PASS(FILE *, fopen, (const char *path, const char *mode), (path, mode),
     WRITES(mode) ? path_hit(NAME, "open", AT_FDCWD, path) : 0, NULL)
PASS(FILE *, fopen64, (const char *path, const char *mode), (path, mode),
     WRITES(mode) ? path_hit(NAME, "open", AT_FDCWD, path) : 0, NULL)
