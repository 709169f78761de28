//! Reading files.

use std::{
    fs::OpenOptions,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use super::report::Refusal;

/// The largest file: room for two million prefixes.
const LARGEST: u64 = 64 << 20;

/// The whole of a regular file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, Refusal> {
    let failed = |error: io::Error| {
        let help = match error.kind() {
            io::ErrorKind::NotFound => "write the file, or name another",
            io::ErrorKind::PermissionDenied => "run as root, or make the file readable",
            io::ErrorKind::IsADirectory => "name the file in it",
            _ => "make the file readable",
        };
        Refusal::new(format!("cannot be read: {error}"), help)
    };
    // A FIFO without a writer would block.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(Refusal::new("is a directory", "name the file in it"));
    }
    if !metadata.is_file() {
        return Err(Refusal::new("is not a regular file", "name a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > LARGEST {
        let message = format!("is larger than {} MiB", LARGEST >> 20);
        return Err(Refusal::new(message, "use shorter prefixes, which cover many sources each"));
    }
    Ok(bytes)
}
