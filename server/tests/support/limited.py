"""Runs a command with less than it would like: limits, forbidden system calls, capabilities taken away.

usage: limited.py [--memlock BYTES] [--fsize BYTES] [--no-io-uring] [--no-peer-pidfd] -- COMMAND [ARGUMENT]...
"""

import ctypes
import os
import resource
import struct
import sys

PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427
GETSOCKOPT = {"x86_64": 55, "aarch64": 209}
SOL_SOCKET, SO_PEERPIDFD = 1, 77
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER, SECOND_ARGUMENT, THIRD_ARGUMENT = 0, 24, 32
ALLOW, FAIL_EPERM, FAIL_ENOPROTOOPT = 0x7FFF0000, 0x00050001, 0x0005005C
Instruction = tuple[int, int, int, int]


def prctl(*arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(*(ctypes.c_ulong(argument) for argument in arguments)) != 0:
        sys.exit(f"prctl{arguments}: {os.strerror(ctypes.get_errno())}")


def limit_memlock(size: int) -> None:
    """Whoever may lock any memory is not held to the limit: root loses that right."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (size, size))
    if os.geteuid() == 0:
        prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK)


def install_filter(program: list[Instruction]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


def forbid_io_uring() -> None:
    """As container runtimes do by default: the three system calls fail with EPERM."""
    install_filter(
        [
            (LOAD_WORD, 0, 0, NUMBER),
            (JUMP_IF_EQUAL, 3, 0, IO_URING_SETUP),
            (JUMP_IF_EQUAL, 2, 0, IO_URING_ENTER),
            (JUMP_IF_EQUAL, 1, 0, IO_URING_REGISTER),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, FAIL_EPERM),
        ]
    )


def forbid_peer_pidfd() -> None:
    """As before Linux 6.5: a socket does not give a descriptor of the process at the other end."""
    install_filter(
        [
            (LOAD_WORD, 0, 0, NUMBER),
            (JUMP_IF_EQUAL, 0, 5, GETSOCKOPT[os.uname().machine]),
            (LOAD_WORD, 0, 0, SECOND_ARGUMENT),
            (JUMP_IF_EQUAL, 0, 3, SOL_SOCKET),
            (LOAD_WORD, 0, 0, THIRD_ARGUMENT),
            (JUMP_IF_EQUAL, 0, 1, SO_PEERPIDFD),
            (RETURN, 0, 0, FAIL_ENOPROTOOPT),
            (RETURN, 0, 0, ALLOW),
        ]
    )


def main() -> None:
    arguments = sys.argv[1:]
    while arguments and (option := arguments.pop(0)) != "--":
        if option == "--memlock":
            limit_memlock(int(arguments.pop(0)))
        elif option == "--fsize":
            size = int(arguments.pop(0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        elif option == "--no-io-uring":
            forbid_io_uring()
        elif option == "--no-peer-pidfd":
            forbid_peer_pidfd()
        else:
            sys.exit(f"unknown option {option}\n{__doc__}")
    os.execvp(arguments[0], arguments)


main()
