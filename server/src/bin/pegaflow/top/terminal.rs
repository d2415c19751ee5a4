//! A terminal that is borrowed: another screen, keys without echo, given back as it was whatever ends the program.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pegaflow_engine::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};

use super::screen::{Size, Style};

/// The other screen, without a cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[2J";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
/// Removes what is left of a line, and of the screen.
const END_LINE: &str = "\x1b[K";
const END_SCREEN: &str = "\x1b[J";

/// What ended a wait.
pub(super) enum Wake {
    /// It is time for another look.
    Time,
    /// The terminal has another size.
    Resized,
    /// The user or the system wants an end.
    End,
}

/// The terminal, while it is ours.
pub(super) struct Terminal {
    /// How keys were read before; `None` if standard input is no terminal.
    before: Option<Termios>,
    signals: UnixStream,
    style: Style,
}

impl Terminal {
    /// Takes the terminal.
    ///
    /// # Errors
    /// `Io` if it can not be set or signals can not be heard.
    pub(super) fn take() -> Result<Self> {
        let signals = hear_signals()?;
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin).ok();
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
        let has_unicode = locale.is_some_and(|locale| locale.to_lowercase().replace('-', "").contains("utf8"));
        let style = Style { has_color: !is_set("NO_COLOR") && !is_dumb, has_unicode };
        let terminal = Self { before, signals, style };
        if let Some(before) = &terminal.before {
            let mut keys = before.clone();
            keys.local_modes &= !(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
            tcsetattr(&stdin, OptionalActions::Now, &keys)
                .map_err(|error| Error::from_io("setting the terminal", error.into()))?;
        }
        write(ENTER)?;
        Ok(terminal)
    }

    /// Puts lines on the screen.
    ///
    /// # Errors
    /// `Io` if the terminal is gone.
    pub(super) fn draw(&mut self, lines: impl FnOnce(Size, Style) -> Vec<String>) -> Result<()> {
        let size = tcgetwinsize(std::io::stdout()).map_or((80, 24), |size| (size.ws_col, size.ws_row));
        // A terminal that does not know its size says 0.
        let of = |given: u16, usual: usize| if given == 0 { usual } else { given.into() };
        let lines = lines(Size { columns: of(size.0, 80), rows: of(size.1, 24) }, self.style);
        let last = lines.len().saturating_sub(1);
        let mut text = String::from(HOME);
        for (at, line) in lines.iter().enumerate() {
            text.push_str(line);
            text.push_str(END_LINE);
            text.push_str(if at < last { "\r\n" } else { END_SCREEN });
        }
        write(&text)
    }

    /// Waits for a key, a signal or the time.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn wait(&mut self, time: Duration) -> Result<Wake> {
        let deadline = Instant::now() + time;
        let stdin = std::io::stdin();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut sources = vec![PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN)];
            if self.before.is_some() {
                sources.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
            }
            match poll(&mut sources, Some(&timeout)) {
                Ok(0) => return Ok(Wake::Time),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(Error::from_io("waiting for a key", error.into())),
            }
            let mut ready = sources.iter().map(|source| !source.revents().is_empty());
            let (is_signal, is_key) = (ready.next() == Some(true), ready.next() == Some(true));
            if is_signal {
                let mut which = [0];
                let is_resized = self.signals.read(&mut which).is_ok_and(|bytes| bytes == 1) && which == [RESIZED];
                return Ok(if is_resized { Wake::Resized } else { Wake::End });
            }
            if is_key {
                let mut keys = [0; 64];
                let read = rustix::io::read(&stdin, &mut keys).unwrap_or(0);
                let is_end = |key: &u8| matches!(key, b'q' | b'Q' | 0x03 | 0x04);
                if read == 0 || keys.iter().take(read).any(is_end) {
                    return Ok(Wake::End);
                }
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _gone = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
        let _gone = write(LEAVE);
    }
}

fn write(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| Error::from_io("the terminal", error))
}

const RESIZED: u8 = b'r';
const ENDED: u8 = b'e';

/// A stream with a byte for each signal: the terminal has another size, or the program is to end.
fn hear_signals() -> Result<UnixStream> {
    static IS_HEARD: AtomicBool = AtomicBool::new(false);
    if IS_HEARD.swap(true, Ordering::AcqRel) {
        return Err(Error::new(ErrorKind::Busy, "the terminal is taken already"));
    }
    let failed = |error| Error::from_io("listening for signals", error);
    let (reader, mut writer) = UnixStream::pair().map_err(failed)?;
    // A byte that finds no room says what those before it say.
    writer.set_nonblocking(true).map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let guard = runtime.enter();
    let (mut resized, mut ended) = (signal(SignalKind::window_change()), signal(SignalKind::terminate()));
    let mut hung_up = signal(SignalKind::hangup());
    drop(guard);
    let work = move || {
        runtime.block_on(async {
            let (Ok(resized), Ok(ended), Ok(hung_up)) = (&mut resized, &mut ended, &mut hung_up) else { return };
            loop {
                let byte = tokio::select! {
                    _ = resized.recv() => RESIZED,
                    _ = ended.recv() => ENDED,
                    _ = hung_up.recv() => ENDED,
                };
                let _full = writer.write(&[byte]);
            }
        });
    };
    std::thread::Builder::new().name("pegaflow-signals".into()).spawn(work).map_err(failed)?;
    Ok(reader)
}
