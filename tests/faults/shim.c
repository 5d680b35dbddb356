/* A library to preload that makes reads and writes below one folder fail, and records the writes.

   It stands between a process and the functions of the C library that change or read files: Python's own calls and
   those of tensorstore's threads go through it. Below the folder in ADAMJAX_FAULTS_ROOT, each change is counted. From the count
   ADAMJAX_FAULTS_AT on, the next change that the fault ADAMJAX_FAULTS_KIND can hit is hit; with ADAMJAX_FAULTS_LASTING,
   each later one as well. ADAMJAX_FAULTS_VALUE is the number of the error or of the signal. With ADAMJAX_FAULTS_LOG,
   all changes that were made go to that file, with their data, in the order in which they were made. Programs that have
   loaded it can call faults_arm, faults_record and faults_mark themselves.

   Not seen: memory-mapped files, writes of C streams (fwrite), and changes of modes and dates. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The names and numbers of both are those of shim.py. */
enum op { CREATE, TRUNCATE, WRITE, SYNC, RENAME, LINK, UNLINK, MKDIR, RMDIR, MARK };
enum kind { NOTHING, FAIL, FULL, SHORT, TEAR, KILL_BEFORE, KILL_AFTER, SIGNAL, FAIL_READ };

struct record {
  uint32_t op, path_size, other_size, data_size;
  int64_t offset;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static int log_fd = -1;
static long count, at;
static int kind, value, lasting, has_fired;

void faults_arm(int new_kind, long new_at, int new_value, int new_lasting) {
  pthread_mutex_lock(&lock);
  kind = new_kind, at = new_at, value = new_value, lasting = new_lasting, has_fired = 0, count = 0;
  pthread_mutex_unlock(&lock);
}

long faults_count(void) { return count; }

int faults_fired(void) { return has_fired; }

void faults_root(const char *path) { snprintf(root, sizeof root, "%s", path); }

/* Record into a file from now on; NULL: no longer. */
void faults_record(const char *path) {
  pthread_mutex_lock(&lock);
  if (log_fd >= 0) syscall(SYS_close, log_fd);
  log_fd = path ? syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
  pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void start(void) {
  const char *text = getenv("ADAMJAX_FAULTS_ROOT");
  if (text) faults_root(text);
  if ((text = getenv("ADAMJAX_FAULTS_KIND"))) kind = atoi(text);
  if ((text = getenv("ADAMJAX_FAULTS_AT"))) at = atol(text);
  if ((text = getenv("ADAMJAX_FAULTS_VALUE"))) value = atoi(text);
  if ((text = getenv("ADAMJAX_FAULTS_LASTING"))) lasting = atoi(text);
  if ((text = getenv("ADAMJAX_FAULTS_LOG"))) faults_record(text);
}

/* Write the absolute path of an open file or folder; return 0 if it has none below the root. */
static int path_of(int fd, char *path) {
  char link[64];
  if (!root[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  long size = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
  path[size < 0 ? 0 : size] = 0;
  size_t n = strlen(root);
  return !strncmp(path, root, n) && (path[n] == '/' || !path[n]) && !strstr(path, " (deleted)");
}

/* Write the absolute path of a name in an open folder; return 0 if it is not below the root. */
static int path_at(int folder, const char *name, char *path) {
  char base[PATH_MAX] = "";
  if (!root[0]) return 0;
  if (name[0] != '/') {
    if (folder != AT_FDCWD)
      path_of(folder, base);
    else if (syscall(SYS_getcwd, base, sizeof base) < 0)
      return 0;
    strncat(base, "/", sizeof base - strlen(base) - 1);
  }
  if (snprintf(path, PATH_MAX, "%s%s", base, name) >= PATH_MAX) return 0;
  size_t n = strlen(root);
  return !strncmp(path, root, n) && path[n] == '/';
}

static void log_change(enum op op, const char *path, const char *other, const struct iovec *v, int n, int64_t offset,
                       size_t size) {
  if (log_fd < 0) return;
  struct record r = {op, strlen(path), other ? strlen(other) : 0, v ? size : 0, offset};
  syscall(SYS_write, log_fd, &r, sizeof r);
  syscall(SYS_write, log_fd, path, r.path_size);
  if (other) syscall(SYS_write, log_fd, other, r.other_size);
  for (int i = 0; v && i < n && size; i++) {
    size_t part = v[i].iov_len < size ? v[i].iov_len : size;
    syscall(SYS_write, log_fd, v[i].iov_base, part);
    size -= part;
  }
}

void faults_mark(const char *text) {
  pthread_mutex_lock(&lock);
  log_change(MARK, text, NULL, NULL, 0, 0, 0);
  pthread_mutex_unlock(&lock);
}

static int needs_space(enum op op) {
  return op == CREATE || op == WRITE || op == MKDIR || op == LINK || op == SYNC;
}

/* Take the lock and count a change; return the fault that hits it. A signal is sent without the lock, for its handler
   may write. */
static enum kind begin(enum op op) {
  pthread_mutex_lock(&lock);
  if (kind == FAIL_READ) return NOTHING;
  count++;
  int is_hit = kind != NOTHING && count >= at && (lasting || !has_fired);
  if (kind == FAIL && (value == ENOSPC || value == EDQUOT)) is_hit &= needs_space(op);
  if (kind == FULL) is_hit = kind && count >= at && (has_fired ? needs_space(op) : op == WRITE);
  if (kind == SHORT || kind == TEAR) is_hit &= op == WRITE;
  if (!is_hit) return NOTHING;
  int is_first = !has_fired;
  has_fired = 1;
  if (kind == KILL_BEFORE) raise(SIGKILL);
  if (kind == SIGNAL) {
    pthread_mutex_unlock(&lock);
    kill(getpid(), value);
    pthread_mutex_lock(&lock);
    return NOTHING;
  }
  if (kind == FULL) return is_first ? SHORT : FAIL;
  return kind;
}

/* End what `begin` began, with the result of the call. */
static long end(enum kind hit, long result) {
  int error = errno;
  if (hit == KILL_AFTER || hit == TEAR) raise(SIGKILL);
  pthread_mutex_unlock(&lock);
  errno = error;
  return result;
}

static long failed(void) {
  pthread_mutex_unlock(&lock);
  errno = kind == FULL ? ENOSPC : value;
  return -1;
}

/* Make a change of names or sizes: count it, let it fail, make it, record it. */
#define CHANGE(op, path, other, offset, call)                         \
  do {                                                                \
    enum kind hit_ = begin(op);                                       \
    if (hit_ == FAIL) return failed();                                \
    long result_ = (call);                                            \
    if (result_ >= 0) log_change(op, path, other, NULL, 0, offset, 0); \
    return end(hit_, result_);                                        \
  } while (0)

static int open_file(int folder, const char *name, int flags, mode_t mode) {
  char path[PATH_MAX];
  struct stat found;
  if (!(flags & (O_CREAT | O_TRUNC)) || !path_at(folder, name, path))
    return syscall(SYS_openat, folder, name, flags, mode);
  int is_there = !fstatat(folder, name, &found, 0);
  if (is_there && !((flags & O_TRUNC) && found.st_size && !(flags & O_EXCL)))
    return syscall(SYS_openat, folder, name, flags, mode);
  if (!is_there && !(flags & O_CREAT)) return syscall(SYS_openat, folder, name, flags, mode);
  CHANGE(is_there ? TRUNCATE : CREATE, path, NULL, 0, syscall(SYS_openat, folder, name, flags, mode));
}

static mode_t mode_of(int flags, va_list rest) {
  return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name)                                   \
  int name(const char *path, int flags, ...) {       \
    va_list rest;                                    \
    va_start(rest, flags);                           \
    mode_t mode = mode_of(flags, rest);              \
    va_end(rest);                                    \
    return open_file(AT_FDCWD, path, flags, mode);   \
  }
#define OPENAT(name)                                       \
  int name(int folder, const char *path, int flags, ...) { \
    va_list rest;                                          \
    va_start(rest, flags);                                 \
    mode_t mode = mode_of(flags, rest);                    \
    va_end(rest);                                          \
    return open_file(folder, path, flags, mode);           \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
int creat(const char *path, mode_t mode) { return open_file(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }
int __open_2(const char *path, int flags) { return open_file(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_file(AT_FDCWD, path, flags, 0); }
int __openat_2(int folder, const char *path, int flags) { return open_file(folder, path, flags, 0); }
int __openat64_2(int folder, const char *path, int flags) { return open_file(folder, path, flags, 0); }

/* Write at an offset, or at the position of the file if it is negative. */
static ssize_t write_vector(int fd, const struct iovec *v, int n, off_t offset, int flags) {
  char path[PATH_MAX];
  struct iovec part[16];
  if (!path_of(fd, path)) {
    if (offset >= 0) return syscall(SYS_pwritev2, fd, v, n, (long)offset, 0L, flags);
    return syscall(SYS_writev, fd, v, n);
  }
  enum kind hit = begin(WRITE);
  if (hit == FAIL) return failed();
  if (hit == SHORT || hit == TEAR) { /* half of it, in as many parts as there is room for */
    size_t size = 0;
    for (int i = 0; i < n; i++) size += v[i].iov_len;
    size = (size + 1) / 2;
    int parts = 0;
    for (; parts < n && parts < 16 && size; parts++) {
      part[parts] = v[parts];
      if (part[parts].iov_len > size) part[parts].iov_len = size;
      size -= part[parts].iov_len;
    }
    v = part, n = parts;
  }
  ssize_t done = offset >= 0 ? syscall(SYS_pwritev2, fd, v, n, (long)offset, 0L, flags) : syscall(SYS_writev, fd, v, n);
  if (done > 0) {
    int64_t start = offset >= 0 ? offset : syscall(SYS_lseek, fd, 0L, SEEK_CUR) - done;
    log_change(WRITE, path, NULL, v, n, start, done);
  }
  return end(hit, done);
}

ssize_t writev(int fd, const struct iovec *v, int n) { return write_vector(fd, v, n, -1, 0); }
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t offset) { return write_vector(fd, v, n, offset, 0); }
ssize_t pwritev64(int fd, const struct iovec *v, int n, off64_t offset) { return write_vector(fd, v, n, offset, 0); }
ssize_t pwritev2(int fd, const struct iovec *v, int n, off_t offset, int flags) {
  return write_vector(fd, v, n, offset, flags);
}
ssize_t pwritev64v2(int fd, const struct iovec *v, int n, off64_t offset, int flags) {
  return write_vector(fd, v, n, offset, flags);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
  struct iovec v = {(void *)data, size};
  return write_vector(fd, &v, 1, offset, 0);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }
ssize_t write(int fd, const void *data, size_t size) {
  struct iovec v = {(void *)data, size};
  return write_vector(fd, &v, 1, -1, 0);
}

/* Reads are counted only where they are to fail. */
static int read_fails(int fd) {
  char path[PATH_MAX];
  if (kind != FAIL_READ || !path_of(fd, path)) return 0;
  pthread_mutex_lock(&lock);
  int is_hit = kind == FAIL_READ && ++count >= at && (lasting || !has_fired);
  if (is_hit) has_fired = 1;
  errno = value;
  pthread_mutex_unlock(&lock);
  return is_hit;
}

ssize_t read(int fd, void *data, size_t size) { return read_fails(fd) ? -1 : syscall(SYS_read, fd, data, size); }
ssize_t pread(int fd, void *data, size_t size, off_t offset) {
  return read_fails(fd) ? -1 : syscall(SYS_pread64, fd, data, size, offset);
}
ssize_t pread64(int fd, void *data, size_t size, off64_t offset) { return pread(fd, data, size, offset); }

/* Copies within the kernel: callers fall back on reading and writing. */
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
  char path[PATH_MAX];
  if (!path_of(out, path)) return syscall(SYS_sendfile, out, in, offset, size);
  errno = ENOTSOCK;
  return -1;
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) { return sendfile(out, in, offset, size); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
  char path[PATH_MAX];
  if (!path_of(out, path)) return syscall(SYS_copy_file_range, in, from, out, to, size, flags);
  errno = ENOSYS;
  return -1;
}

int ftruncate(int fd, off_t size) {
  char path[PATH_MAX];
  struct stat found;
  if (!path_of(fd, path) || (!fstat(fd, &found) && found.st_size == size)) return syscall(SYS_ftruncate, fd, size);
  CHANGE(TRUNCATE, path, NULL, size, syscall(SYS_ftruncate, fd, size));
}
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }
int truncate(const char *name, off_t size) {
  char path[PATH_MAX];
  if (!path_at(AT_FDCWD, name, path)) return syscall(SYS_truncate, name, size);
  CHANGE(TRUNCATE, path, NULL, size, syscall(SYS_truncate, name, size));
}
int truncate64(const char *name, off64_t size) { return truncate(name, size); }

/* The disk need not be waited for: whether data is on it is known from the record. */
static int sync_file(int fd, long call) {
  char path[PATH_MAX];
  if (!path_of(fd, path)) return syscall(call, fd);
  CHANGE(SYNC, path, NULL, 0, 0);
}
int fsync(int fd) { return sync_file(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_file(fd, SYS_fdatasync); }

static int rename_file(int a, const char *from, int b, const char *to, unsigned flags) {
  char path[PATH_MAX], other[PATH_MAX];
  if (!path_at(a, from, path) | !path_at(b, to, other)) return syscall(SYS_renameat2, a, from, b, to, flags);
  CHANGE(RENAME, path, other, 0, syscall(SYS_renameat2, a, from, b, to, flags));
}
int rename(const char *from, const char *to) { return rename_file(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return rename_file(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  return rename_file(a, from, b, to, flags);
}

int linkat(int a, const char *from, int b, const char *to, int flags) {
  char path[PATH_MAX], other[PATH_MAX];
  if (!path_at(a, from, path) | !path_at(b, to, other)) return syscall(SYS_linkat, a, from, b, to, flags);
  CHANGE(LINK, path, other, 0, syscall(SYS_linkat, a, from, b, to, flags));
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int folder, const char *name, int flags) {
  char path[PATH_MAX];
  if (!path_at(folder, name, path)) return syscall(SYS_unlinkat, folder, name, flags);
  CHANGE(flags & AT_REMOVEDIR ? RMDIR : UNLINK, path, NULL, 0, syscall(SYS_unlinkat, folder, name, flags));
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
int remove(const char *name) {
  int result = unlink(name);
  return result && errno == EISDIR ? rmdir(name) : result;
}

int mkdirat(int folder, const char *name, mode_t mode) {
  char path[PATH_MAX];
  if (!path_at(folder, name, path)) return syscall(SYS_mkdirat, folder, name, mode);
  CHANGE(MKDIR, path, NULL, 0, syscall(SYS_mkdirat, folder, name, mode));
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }
