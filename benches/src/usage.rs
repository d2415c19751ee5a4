//! What this process has used of the machine.
#![expect(unsafe_code, reason = "asks the kernel for the process's times")]

use std::time::Duration;

/// Time on CPUs that all threads of this process have had, in user space and in the kernel.
pub fn cpu_time() -> Duration {
    // SAFETY: a structure of numbers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid for the call. It can not fail for this process.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    let of = |time: libc::timeval| Duration::new(time.tv_sec.unsigned_abs(), time.tv_usec.unsigned_abs() as u32 * 1000);
    of(usage.ru_utime) + of(usage.ru_stime)
}
