//! Cleans up however the play ends: Ctrl-C, a closed terminal, a crash.

use std::process::ExitCode;

use nix::{
    errno::Errno,
    sys::{
        prctl::set_child_subreaper,
        signal::{SigSet, SigmaskHow, Signal, killpg},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork, setpgid},
};
use tunroute_tests::lab::remove_stale;

/// Runs `play` in a child process and hands on its exit status. At its end, or when this process is told to end, all
/// that the child has started is killed, and the namespaces, mounts and directories that it has not removed itself are.
///
/// To be called before any thread is started.
pub fn watch_over(play: impl FnOnce() -> ExitCode) -> ExitCode {
    match try_to(play) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("demo: cannot watch over the play: {error}");
            ExitCode::FAILURE
        }
    }
}

fn try_to(play: impl FnOnce() -> ExitCode) -> nix::Result<ExitCode> {
    let mut awaited = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD] {
        awaited.add(signal);
    }
    let usual = awaited.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    // Orphaned processes become this process's children, so that it knows when they are gone.
    set_child_subreaper(true)?;
    // SAFETY: there is only this thread, so the child may do anything.
    match unsafe { fork() }? {
        ForkResult::Child => {
            // A group of its own: Ctrl-C reaches only the guard, and the guard reaches all of them.
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            usual.thread_set_mask()?;
            Ok(play())
        }
        ForkResult::Parent { child } => {
            let (code, interrupted) = wait_for(child, &awaited)?;
            let left = clean_up(child);
            for failure in &left {
                eprintln!("demo: cannot remove what the play has left: {failure:#}");
            }
            if interrupted && left.is_empty() {
                eprintln!("\ndemo: interrupted; everything is removed");
            }
            Ok(if left.is_empty() { code } else { ExitCode::FAILURE })
        }
    }
}

/// Waits for the end of the play; a signal ends it. Returns the exit status, and whether there was a signal.
fn wait_for(child: Pid, awaited: &SigSet) -> nix::Result<(ExitCode, bool)> {
    let mut interrupted = None;
    loop {
        match awaited.wait()? {
            Signal::SIGCHLD => {}
            signal => {
                interrupted.get_or_insert(signal);
                // Its group may not be there yet, or no more.
                let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
            }
        }
        let code = match waitpid(child, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::Exited(_, code) => code,
            WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
            _ => continue,
        };
        let code = interrupted.map_or(code, |signal| 128 + signal as i32);
        return Ok((ExitCode::from(u8::try_from(code).unwrap_or(1)), interrupted.is_some()));
    }
}

/// Kills the rest of the play's process group, waits until it is gone, and removes the namespaces.
fn clean_up(child: Pid) -> Vec<anyhow::Error> {
    match killpg(child, Signal::SIGKILL) {
        // No process is left: the play has ended.
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => return vec![error.into()],
    }
    while waitpid(None, None).is_ok() {}
    remove_stale()
}
