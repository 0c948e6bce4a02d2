"""A filter of system calls for programs that nobody has read: one process, no sockets, no odd corners of the kernel.

Namespaces and rlimits leave gaps that this one closes: memory that RLIMIT_AS does not count (memfd, System V and
POSIX queues), processes where RLIMIT_NPROC does not bind (the user is root), VSOCK (which network namespaces do not
part), and calls through which kernels were broken before. Threads are allowed. Numbers are from Linux'
asm/unistd_64.h (x86-64) and asm-generic/unistd.h (arm64); the program's layout is in linux/filter.h and seccomp.h.
"""

import errno
import platform
import struct

# machine → the kernel's AUDIT_ARCH
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
MACHINES = tuple(_ARCHITECTURES)

# name → numbers on x86-64 and arm64; None: there is no such call
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "syslog": (103, 116),
    "vmsplice": (278, 75),
    "move_pages": (279, 239),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "mlock": (149, 228),
    "quotactl": (179, 60),
    "personality": (135, 92),
}
_CLONE = (56, 220)
_CLONE3 = 435  # its flags are behind a pointer that no filter can follow: glibc falls back to clone
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000  # x86-64's second table of calls begins here

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def program(machine: str | None = None) -> bytes:
    """The filter as an array of struct sock_filter, as `bwrap --seccomp` reads it.

    Raises:
        KeyError: for a machine that is not in MACHINES.
    """
    machine = machine or platform.machine()
    architecture = _ARCHITECTURES[machine]
    column = MACHINES.index(machine)
    denied = [number for row in _DENIED.values() if (number := row[column]) is not None]
    code = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, architecture, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_EQUAL, _CLONE3, 0, 1),
        _step(_RETURN, _ERROR | errno.ENOSYS),
    ]
    for number in denied:
        code += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _ERROR | errno.EPERM)]
    if machine == "x86_64":
        code += [_step(_AT_LEAST, _X32, 0, 1), _step(_RETURN, _ERROR | errno.EPERM)]
    code += [
        _step(_EQUAL, _CLONE[column], 0, 3),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_ANY_BIT, _CLONE_THREAD, 1, 0),
        _step(_RETURN, _ERROR | errno.EPERM),
        _step(_RETURN, _ALLOW),
    ]
    return b"".join(code)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
