/* Stands between a process and the system: the Nth call that touches one of two folders fails, is short, or is the last
 * thing the process does; and what changes the destination is logged, so that a power cut can be played afterwards.
 *
 * Loaded with LD_PRELOAD. Orders lie in one shared page (struct orders), which a parent fills before it forks and reads
 * when the child is gone. Calls on anything outside the two folders pass untouched.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind {
    OPEN, CREATE, OPENDIR, STAT, READ, MMAP, FADVISE, FLOCK, CLOSE,
    WRITE, PWRITE, FSYNC, FDATASYNC, FTRUNCATE, FALLOCATE, RENAME, LINK, UNLINK, KINDS
};
enum how { FAIL, LATE, SHORT, END, KILL_BEFORE, KILL_AFTER, KILL_HALF };
enum folder { NOWHERE = -1, SOURCE, DESTINATION };

struct orders {
    int32_t armed;
    int32_t how;
    int32_t error;        /* errno of FAIL and LATE */
    int32_t sticky;       /* every matching call from the Nth on, not it alone */
    int64_t at;           /* N, from 1; 0: none */
    uint32_t calls[2];    /* per folder: bit k = calls of kind k are counted */
    int64_t counted;      /* out: matching calls seen */
    int64_t struck;       /* out: how many were struck */
    int32_t struck_kind;  /* out: of the first one */
    int32_t struck_folder;
    char struck_path[512];
    int32_t log;          /* descriptor that the destination's changes are written to, or -1 */
    char folders[2][1024];
    int64_t kinds[2][KINDS]; /* out: calls by folder and kind, whether they match or not */
};

static struct orders *orders;
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
#define DESCRIPTORS 4096
static signed char where[DESCRIPTORS]; /* folder + 1 */
static char names[DESCRIPTORS][256];  /* of what is open there */

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); real; })

struct orders *shim_orders(void) {
    if (!orders) {
        orders = mmap(NULL, sizeof *orders, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        orders->log = -1;
    }
    return orders;
}

static int watching(void) { return orders && orders->armed; }

static enum folder folder_of(const char *path) {
    char full[2048];
    if (!path) return NOWHERE;
    if (path[0] != '/') {
        if (!getcwd(full, sizeof full - strlen(path) % 1000 - 2)) return NOWHERE;
        size_t length = strlen(full);
        snprintf(full + length, sizeof full - length, "/%s", path);
        path = full;
    }
    for (int number = DESTINATION; number >= SOURCE; number--) {
        const char *folder = orders->folders[number];
        size_t length = strlen(folder);
        if (length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length])) return number;
    }
    return NOWHERE;
}

static enum folder folder_of_descriptor(int descriptor) {
    return descriptor >= 0 && descriptor < DESCRIPTORS ? where[descriptor] - 1 : NOWHERE;
}

static const char *name_of(int descriptor) { return folder_of_descriptor(descriptor) == NOWHERE ? "" : names[descriptor]; }

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* Counts a call. Returns what must be done with it: a `how`, or -1 for nothing. */
static int strike(enum kind kind, enum folder folder, const char *path) {
    if (folder == NOWHERE) return -1;
    __atomic_add_fetch(&orders->kinds[folder][kind], 1, __ATOMIC_SEQ_CST);
    if (!(orders->calls[folder] >> kind & 1)) return -1;
    int64_t number = __atomic_add_fetch(&orders->counted, 1, __ATOMIC_SEQ_CST);
    if (!orders->at || !(number == orders->at || (orders->sticky && number > orders->at))) return -1;
    if (__atomic_fetch_add(&orders->struck, 1, __ATOMIC_SEQ_CST) == 0) {
        orders->struck_kind = kind;
        orders->struck_folder = folder;
        snprintf(orders->struck_path, sizeof orders->struck_path, "%s", path ? path : "");
    }
    if (orders->how == KILL_BEFORE) die();
    return orders->how;
}

/* -- the log: one record per change of the destination */

struct record { int32_t kind; int32_t is_folder; int64_t inode, offset, length; int32_t path, other; };

static void put(const void *data, size_t length) {
    while (length) {
        ssize_t count = REAL(write)(orders->log, data, length);
        if (count <= 0) return;
        data = (const char *)data + count;
        length -= count;
    }
}

static void note(enum kind kind, int descriptor, int64_t offset, int64_t length, const void *data, const char *path, const char *other) {
    if (orders->log < 0) return;
    int saved = errno;
    struct stat status = {0};
    if (descriptor >= 0) REAL(fstat)(descriptor, &status);
    struct record record = {kind, S_ISDIR(status.st_mode), status.st_ino, offset, length,
                            path ? (int)strlen(path) : 0, other ? (int)strlen(other) : 0};
    put(&record, sizeof record);
    put(path, record.path);
    put(other, record.other);
    if (data) put(data, length);
    errno = saved;
}

/* How every call goes: count it, perhaps do it, perhaps say that it failed, perhaps die. `done` runs under the lock. */
#define WATCHED(type, kind, folder, path, perform, done)                                       \
    do {                                                                                       \
        int _how = strike(kind, folder, path);                                                 \
        if (_how == FAIL) { errno = orders->error; return (type)-1; }                          \
        int _locks = kind >= WRITE && kind != FSYNC && kind != FDATASYNC && folder == DESTINATION; \
        if (_locks) pthread_mutex_lock(&lock);                                                 \
        type _result = perform;                                                                \
        if (_result != (type)-1) { done; }                                                     \
        if (_locks) pthread_mutex_unlock(&lock);                                               \
        if (_how == KILL_AFTER || _how == KILL_HALF) die();                                    \
        if (_how == LATE) { errno = orders->error; return (type)-1; }                          \
        return _result;                                                                        \
    } while (0)

/* -- open */

static int opened(const char *path, int flags, mode_t mode, int (*real)(const char *, int, ...)) {
    if (!watching()) return real(path, flags, mode);
    enum folder folder = folder_of(path);
    enum kind kind = flags & (O_CREAT | O_WRONLY | O_RDWR) ? CREATE : OPEN;
    int how = strike(kind, folder, path);
    if (how == FAIL) { errno = orders->error; return -1; }
    pthread_mutex_lock(&lock);
    struct stat before;
    int is_new = flags & O_CREAT && REAL(lstat)(path, &before) != 0;
    int descriptor = real(path, flags, mode);
    if (descriptor >= 0 && descriptor < DESCRIPTORS) {
        where[descriptor] = folder + 1;
        snprintf(names[descriptor], sizeof names[0], "%s", path);
    }
    if (descriptor >= 0 && folder == DESTINATION && kind == CREATE) {
        if (is_new) note(CREATE, descriptor, 0, 0, NULL, path, NULL);
        else if (flags & O_TRUNC) note(FTRUNCATE, descriptor, 0, 0, NULL, NULL, NULL);
    }
    pthread_mutex_unlock(&lock);
    if (how == KILL_AFTER || how == KILL_HALF) die();
    if (how == LATE) {
        if (descriptor >= 0) { where[descriptor] = 0; REAL(close)(descriptor); }
        errno = orders->error;
        return -1;
    }
    return descriptor;
}

#define MODE(flags) ({ mode_t _mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list _rest; va_start(_rest, flags); _mode = va_arg(_rest, mode_t); va_end(_rest); } _mode; })
int open(const char *path, int flags, ...) { return opened(path, flags, MODE(flags), REAL(open)); }
int open64(const char *path, int flags, ...) { return opened(path, flags, MODE(flags), REAL(open64)); }
int openat(int at, const char *path, int flags, ...) {
    mode_t mode = MODE(flags);
    if (at == AT_FDCWD || path[0] == '/') return open64(path, flags, mode);
    return REAL(openat)(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) { mode_t mode = MODE(flags); return openat(at, path, flags, mode); }

DIR *opendir(const char *path) {
    if (watching()) {
        int how = strike(OPENDIR, folder_of(path), path);
        if (how == FAIL || how == LATE) { errno = orders->error; return NULL; }
        if (how == KILL_AFTER || how == KILL_HALF) die();
    }
    return REAL(opendir)(path);
}

int close(int descriptor) {
    enum folder folder = folder_of_descriptor(descriptor);
    if (!watching() || folder == NOWHERE) return REAL(close)(descriptor);
    int how = strike(CLOSE, folder, name_of(descriptor));
    where[descriptor] = 0;
    int result = REAL(close)(descriptor); /* a descriptor is gone whatever close says */
    if (how == KILL_AFTER || how == KILL_HALF) die();
    if (how == FAIL || how == LATE) { errno = orders->error; return -1; }
    return result;
}

/* -- what looks */

#define STAT_CALL(name, parameters, arguments, folder, path) \
    int name parameters {                                    \
        if (!watching()) return REAL(name) arguments;        \
        WATCHED(int, STAT, folder, path, REAL(name) arguments, ); \
    }
STAT_CALL(stat, (const char *path, struct stat *out), (path, out), folder_of(path), path)
STAT_CALL(stat64, (const char *path, struct stat64 *out), (path, out), folder_of(path), path)
STAT_CALL(lstat, (const char *path, struct stat *out), (path, out), folder_of(path), path)
STAT_CALL(lstat64, (const char *path, struct stat64 *out), (path, out), folder_of(path), path)
STAT_CALL(fstat, (int fd, struct stat *out), (fd, out), folder_of_descriptor(fd), name_of(fd))
STAT_CALL(fstat64, (int fd, struct stat64 *out), (fd, out), folder_of_descriptor(fd), name_of(fd))
STAT_CALL(statvfs, (const char *path, struct statvfs *out), (path, out), folder_of(path), path)
STAT_CALL(statvfs64, (const char *path, struct statvfs64 *out), (path, out), folder_of(path), path)
STAT_CALL(fstatvfs64, (int fd, struct statvfs64 *out), (fd, out), folder_of_descriptor(fd), name_of(fd))

int flock(int fd, int operation) {
    if (!watching()) return REAL(flock)(fd, operation);
    WATCHED(int, FLOCK, folder_of_descriptor(fd), name_of(fd), REAL(flock)(fd, operation), );
}

/* -- reading */

#define READ_CALL(name, parameters, arguments, shorten)                                        \
    ssize_t name parameters {                                                                  \
        struct iovec half;                                                                     \
        (void)half;                                                                            \
        if (!watching()) return REAL(name) arguments;                                          \
        int how = strike(READ, folder_of_descriptor(fd), name_of(fd));                                \
        if (how == FAIL || how == LATE) { errno = orders->error; return -1; }                  \
        if (how == END) return 0;                                                              \
        if (how == SHORT) { shorten; }                                                         \
        ssize_t result = REAL(name) arguments;                                                 \
        if (how == KILL_AFTER || how == KILL_HALF) die();                                      \
        return result;                                                                         \
    }
#define HALF count = count > 1 ? count / 2 : count
#define HALF_VECTOR half = *vector; half.iov_len = half.iov_len > 1 ? half.iov_len / 2 : half.iov_len; vector = &half; parts = 1
READ_CALL(read, (int fd, void *data, size_t count), (fd, data, count), HALF)
READ_CALL(pread, (int fd, void *data, size_t count, off_t at), (fd, data, count, at), HALF)
READ_CALL(pread64, (int fd, void *data, size_t count, off64_t at), (fd, data, count, at), HALF)
READ_CALL(readv, (int fd, const struct iovec *vector, int parts), (fd, vector, parts), HALF_VECTOR)
READ_CALL(preadv, (int fd, const struct iovec *vector, int parts, off_t at), (fd, vector, parts, at), HALF_VECTOR)
READ_CALL(preadv64, (int fd, const struct iovec *vector, int parts, off64_t at), (fd, vector, parts, at), HALF_VECTOR)
READ_CALL(preadv64v2, (int fd, const struct iovec *vector, int parts, off64_t at, int flags), (fd, vector, parts, at, flags), HALF_VECTOR)

#define MMAP_CALL(name, offset_type)                                                           \
    void *name(void *address, size_t length, int protection, int flags, int fd, offset_type at) { \
        if (!watching() || fd < 0) return REAL(name)(address, length, protection, flags, fd, at); \
        WATCHED(void *, MMAP, folder_of_descriptor(fd), name_of(fd), REAL(name)(address, length, protection, flags, fd, at), ); \
    }
MMAP_CALL(mmap, off_t)
MMAP_CALL(mmap64, off64_t)

#define FADVISE_CALL(name, offset_type)                                                        \
    int name(int fd, offset_type at, offset_type length, int advice) {                         \
        if (watching()) {                                                                      \
            int how = strike(FADVISE, folder_of_descriptor(fd), name_of(fd));                         \
            if (how == FAIL || how == LATE) return orders->error;                              \
            if (how == KILL_AFTER || how == KILL_HALF) die();                                  \
        }                                                                                      \
        return REAL(name)(fd, at, length, advice);                                             \
    }
FADVISE_CALL(posix_fadvise, off_t)
FADVISE_CALL(posix_fadvise64, off64_t)

/* -- changing */

static ssize_t written(enum kind kind, int fd, const void *data, size_t count, off64_t at) {
    enum folder folder = folder_of_descriptor(fd);
    int how = strike(kind, folder, name_of(fd));
    if (how == FAIL || how == LATE) { errno = orders->error; return -1; }
    if ((how == SHORT || how == KILL_HALF) && count > 1) count /= 2;
    int logged = folder == DESTINATION && orders->log >= 0;
    if (logged) pthread_mutex_lock(&lock);
    struct stat status;
    if (kind == WRITE && logged && !REAL(fstat)(fd, &status))
        at = REAL(fcntl)(fd, F_GETFL) & O_APPEND ? status.st_size : lseek(fd, 0, SEEK_CUR);
    ssize_t result = kind == WRITE ? REAL(write)(fd, data, count) : REAL(pwrite64)(fd, data, count, at);
    if (logged) {
        if (result > 0) note(PWRITE, fd, at, result, data, NULL, NULL);
        pthread_mutex_unlock(&lock);
    }
    if (how == KILL_AFTER || how == KILL_HALF) die();
    return result;
}

ssize_t write(int fd, const void *data, size_t count) {
    return watching() && folder_of_descriptor(fd) != NOWHERE ? written(WRITE, fd, data, count, 0) : REAL(write)(fd, data, count);
}
ssize_t pwrite(int fd, const void *data, size_t count, off_t at) {
    return watching() ? written(PWRITE, fd, data, count, at) : REAL(pwrite)(fd, data, count, at);
}
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
    return watching() ? written(PWRITE, fd, data, count, at) : REAL(pwrite64)(fd, data, count, at);
}

#define SYNC_CALL(name, kind)                                                                  \
    int name(int fd) {                                                                         \
        enum folder folder = folder_of_descriptor(fd);                                         \
        if (!watching() || folder == NOWHERE) return REAL(name)(fd);                           \
        int how = strike(kind, folder, name_of(fd));                                                  \
        if (how == FAIL) { errno = orders->error; return -1; }                                 \
        /* What was written before it began is durable once it returns: noted before, believed after. */ \
        if (folder == DESTINATION) {                                                           \
            pthread_mutex_lock(&lock); note(kind, fd, 0, 0, NULL, NULL, NULL); pthread_mutex_unlock(&lock); \
        }                                                                                      \
        int result = 0; /* nothing here needs the disk: a power cut is played from the log */    \
        if (how == KILL_AFTER || how == KILL_HALF) die();                                      \
        if (how == LATE) { errno = orders->error; return -1; }                                 \
        return result;                                                                         \
    }
SYNC_CALL(fsync, FSYNC)
SYNC_CALL(fdatasync, FDATASYNC)

#define SIZE_CALL(name, kind, parameters, arguments, size)                                     \
    int name parameters {                                                                      \
        if (!watching()) return REAL(name) arguments;                                          \
        WATCHED(int, kind, folder_of_descriptor(fd), name_of(fd), REAL(name) arguments,               \
                if (folder_of_descriptor(fd) == DESTINATION && !_result) note(kind, fd, 0, size, NULL, NULL, NULL)); \
    }
SIZE_CALL(ftruncate, FTRUNCATE, (int fd, off_t length), (fd, length), length)
SIZE_CALL(ftruncate64, FTRUNCATE, (int fd, off64_t length), (fd, length), length)
SIZE_CALL(fallocate, FALLOCATE, (int fd, int mode, off_t at, off_t length), (fd, mode, at, length), at + length)
SIZE_CALL(fallocate64, FALLOCATE, (int fd, int mode, off64_t at, off64_t length), (fd, mode, at, length), at + length)

int rename(const char *from, const char *to) {
    if (!watching()) return REAL(rename)(from, to);
    enum folder folder = folder_of(to);
    WATCHED(int, RENAME, folder, to, REAL(rename)(from, to),
            if (folder == DESTINATION) note(RENAME, -1, 0, 0, NULL, from, to));
}
int renameat(int a, const char *from, int b, const char *to) {
    return a == AT_FDCWD && b == AT_FDCWD ? rename(from, to) : REAL(renameat)(a, from, b, to);
}
int link(const char *from, const char *to) {
    if (!watching()) return REAL(link)(from, to);
    enum folder folder = folder_of(to);
    WATCHED(int, LINK, folder, to, REAL(link)(from, to),
            if (folder == DESTINATION) note(LINK, -1, 0, 0, NULL, from, to));
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    return a == AT_FDCWD && b == AT_FDCWD ? link(from, to) : REAL(linkat)(a, from, b, to, flags);
}
int unlink(const char *path) {
    if (!watching()) return REAL(unlink)(path);
    enum folder folder = folder_of(path);
    WATCHED(int, UNLINK, folder, path, REAL(unlink)(path),
            if (folder == DESTINATION) note(UNLINK, -1, 0, 0, NULL, path, NULL));
}
int unlinkat(int at, const char *path, int flags) {
    return at == AT_FDCWD && !flags ? unlink(path) : REAL(unlinkat)(at, path, flags);
}
