//! How worn the drive under a store is: its SMART / Health Information log page, and which device that is. Reads only,
//! beside everything else; a drive that tells nothing is no error.
//!
//! The page comes from the program `nvme` where it is installed and may read the device (it needs `CAP_SYS_ADMIN`): the
//! kernel gives it to an ioctl alone, which this crate does not make, since unsafe code is kept to the ring, the arena and
//! the GPU; sysfs shows no more than the temperature. It is asked for the raw page, whose layout is the specification's and
//! does not change with the program's version.

mod device;
mod log_page;
mod tool;

pub use device::controllers_of;
pub use log_page::DriveHealth;
pub use tool::HealthReader;
