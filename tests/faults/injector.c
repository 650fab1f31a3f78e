/* Let the n-th system call that changes a folder fail, or be the last one of the process.
 *
 * A seccomp filter turns these calls into SIGSYS, whatever library makes them: safetensors renames by a bare syscall
 * instruction, which LD_PRELOAD does not see. The handler counts the call, and makes it with the one syscall instruction
 * that the filter lets pass. A call counts if it creates, writes, resizes, flushes, renames or removes a file or a folder
 * in the folder, or opens one for writing. The filter lasts until the end of the process, so it is for forks.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum mode { COUNT, KILL, FAIL, FAIL_FROM, SHORT };
enum where { FILE_0, FILE_2, PATH_0, PATH_1, PATH_2_OF_3 }; /* the argument that says what is changed */

/* The calls; space: a full disk refuses them. */
static const struct call {
  int number;
  const char *name;
  enum where where;
  int space;
} calls[] = {
    {SYS_openat, "open", PATH_1, 1},
    {SYS_write, "write", FILE_0, 1},
    {SYS_pwrite64, "pwrite", FILE_0, 1},
    {SYS_writev, "writev", FILE_0, 1},
    {SYS_pwritev, "pwritev", FILE_0, 1},
    {SYS_sendfile, "sendfile", FILE_0, 1},
    {SYS_copy_file_range, "copy_file_range", FILE_2, 1},
    {SYS_ftruncate, "ftruncate", FILE_0, 1},
    {SYS_fallocate, "fallocate", FILE_0, 1},
    {SYS_fsync, "fsync", FILE_0, 1},
    {SYS_fdatasync, "fdatasync", FILE_0, 1},
    {SYS_mkdirat, "mkdir", PATH_1, 1},
    {SYS_linkat, "link", PATH_2_OF_3, 1},
    {SYS_renameat2, "rename", PATH_1, 0},
    {SYS_unlinkat, "unlink", PATH_1, 0},
    {SYS_fchmod, "chmod", FILE_0, 0},
    {SYS_fchmodat, "chmod", PATH_1, 0},
    {SYS_utimensat, "utime", PATH_1, 0},
#ifdef SYS_renameat
    {SYS_renameat, "rename", PATH_1, 0},
#endif
#ifdef SYS_open /* the older calls, without the folder as an argument */
    {SYS_open, "open", PATH_0, 1},
    {SYS_creat, "creat", PATH_0, 1},
    {SYS_mkdir, "mkdir", PATH_0, 1},
    {SYS_rename, "rename", PATH_0, 0},
    {SYS_unlink, "unlink", PATH_0, 0},
    {SYS_rmdir, "rmdir", PATH_0, 0},
    {SYS_chmod, "chmod", PATH_0, 0},
#endif
};
#define CALLS (sizeof calls / sizeof *calls)

/* The syscall instruction that passes: injector_call(number, six arguments) returns what the kernel does. */
long injector_call(long, long, long, long, long, long, long) __attribute__((visibility("hidden")));
extern char injector_called[] __attribute__((visibility("hidden")));
#if defined __x86_64__
__asm__(".text\n.hidden injector_call\n.globl injector_call\ninjector_call:\n"
        "mov %rdi, %rax\nmov %rsi, %rdi\nmov %rdx, %rsi\nmov %rcx, %rdx\nmov %r8, %r10\nmov %r9, %r8\n"
        "mov 8(%rsp), %r9\nsyscall\n.hidden injector_called\n.globl injector_called\ninjector_called:\nret\n");
#define REGISTERS(context) ((context)->uc_mcontext.gregs)
#define ARGUMENT(context, i) ((long)REGISTERS(context)[(const int[]){REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9}[i]])
#define RESULT(context) (REGISTERS(context)[REG_RAX])
#elif defined __aarch64__
__asm__(".text\n.hidden injector_call\n.globl injector_call\ninjector_call:\n"
        "mov x8, x0\nmov x0, x1\nmov x1, x2\nmov x2, x3\nmov x3, x4\nmov x4, x5\nmov x5, x6\n"
        "svc #0\n.hidden injector_called\n.globl injector_called\ninjector_called:\nret\n");
#define ARGUMENT(context, i) ((long)(context)->uc_mcontext.regs[i])
#define RESULT(context) ((context)->uc_mcontext.regs[0])
#endif

static char folder[PATH_MAX];
static long at, seen;
static int mode, code, trace;
static pid_t owner;

/* Write the path of `name`, relative to an open folder, to `path`. */
static void resolve(int at_folder, const char *name, char *path) {
  char link[64];
  size_t length = 0;
  if (name[0] != '/') {
    if (at_folder == AT_FDCWD)
      strcpy(link, "/proc/self/cwd");
    else
      snprintf(link, sizeof link, "/proc/self/fd/%d", at_folder);
    long read = injector_call(SYS_readlinkat, AT_FDCWD, (long)link, (long)path, PATH_MAX - 1, 0, 0);
    length = read > 0 ? (size_t)read : 0;
    if (name[0]) path[length++] = '/';
  }
  snprintf(path + length, PATH_MAX - length, "%s", name);
}

static int is_inside(const char *path) {
  size_t length = strlen(folder);
  return !strncmp(path, folder, length) && (!path[length] || path[length] == '/');
}

static int only_reads(const struct call *call, const long *a) {
  long flags = a[call->where == PATH_1 ? 2 : 1];
  return !strcmp(call->name, "open") && (flags & O_ACCMODE) == O_RDONLY && !(flags & (O_CREAT | O_TRUNC));
}

/* Decide what becomes of a call: 0: it is made; a negative number: it fails so; 1: half of what it writes is written. */
static long judge(const struct call *call, const long *a) {
  char path[PATH_MAX];
  if (injector_call(SYS_getpid, 0, 0, 0, 0, 0, 0) != owner || only_reads(call, a)) return 0;
  switch (call->where) {
    case FILE_0: resolve((int)a[0], "", path); break;
    case FILE_2: resolve((int)a[2], "", path); break;
    case PATH_0: resolve(AT_FDCWD, (const char *)a[0], path); break;
    case PATH_1: resolve((int)a[0], a[1] ? (const char *)a[1] : "", path); break;
    default: resolve((int)a[2], (const char *)a[3], path);
  }
  if (!is_inside(path)) return 0;
  long number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
  if (trace >= 0) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", call->name, path + strlen(folder));
    injector_call(SYS_write, trace, (long)line, length, 0, 0, 0);
  }
  if (mode == KILL && number == at) injector_call(SYS_kill, owner, SIGKILL, 0, 0, 0, 0);
  if (mode == FAIL && number == at) return -code;
  if (mode == FAIL_FROM && number >= at && (code != ENOSPC || call->space)) return -code;
  return mode == SHORT && number == at;
}

/* Make a call that writes, with half of what it should write. */
static long write_half(const struct call *call, const long *a) {
  long b[6];
  memcpy(b, a, sizeof b);
  if (call->number == SYS_write || call->number == SYS_pwrite64)
    b[2] = a[2] > 1 ? a[2] / 2 : a[2];
  else if (call->number == SYS_sendfile)
    b[3] = a[3] > 1 ? a[3] / 2 : a[3];
  else if (call->number == SYS_copy_file_range)
    b[4] = a[4] > 1 ? a[4] / 2 : a[4];
  else if (call->number == SYS_writev)
    b[2] = 1;
  return injector_call(call->number, b[0], b[1], b[2], b[3], b[4], b[5]);
}

static void handle(int signal, siginfo_t *info, void *raw) {
  ucontext_t *context = raw;
  long a[6], result = 0;
  (void)signal;
  for (int i = 0; i < 6; i++) a[i] = ARGUMENT(context, i);
  for (size_t i = 0; i < CALLS; i++) {
    if (calls[i].number != info->si_syscall) continue;
    result = judge(&calls[i], a);
    if (result > 0)
      result = write_half(&calls[i], a);
    else if (!result)
      result = injector_call(calls[i].number, a[0], a[1], a[2], a[3], a[4], a[5]);
    break;
  }
  RESULT(context) = result;
}

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define IF_EQUAL(value, then, otherwise) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(value), then, otherwise)
#define RETURN(action) BPF_STMT(BPF_RET | BPF_K, action)

/* Begin to count in this process. what: a mode; failure: an errno; where: the folder; list: a file for the calls, or "".
 * Return 0, or an errno where the kernel refuses the filter. */
int injector_arm(int what, long number, int failure, const char *where, const char *list) {
  struct sock_filter filter[CALLS + 8];
  size_t size = 0;
  uint64_t passes = (uint64_t)(uintptr_t)injector_called;
  snprintf(folder, sizeof folder, "%s", where);
  mode = what, at = number, code = failure, seen = 0, owner = getpid();
  trace = list[0] ? open(list, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
  struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
  if (sigaction(SIGSYS, &action, NULL)) return errno;
  filter[size++] = (struct sock_filter)LOAD(nr);
  for (size_t i = 0; i < CALLS; i++) filter[size++] = (struct sock_filter)IF_EQUAL(calls[i].number, CALLS - i, 0);
  filter[size++] = (struct sock_filter)RETURN(SECCOMP_RET_ALLOW);
  filter[size++] = (struct sock_filter)LOAD(instruction_pointer);
  filter[size++] = (struct sock_filter)IF_EQUAL(passes, 0, 2);
  filter[size++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4);
  filter[size++] = (struct sock_filter)IF_EQUAL(passes >> 32, 1, 0);
  filter[size++] = (struct sock_filter)RETURN(SECCOMP_RET_TRAP);
  filter[size++] = (struct sock_filter)RETURN(SECCOMP_RET_ALLOW);
  struct sock_fprog program = {.len = (unsigned short)size, .filter = filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) ? errno : 0;
}
