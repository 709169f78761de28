use std::{collections::BTreeMap, os::unix::fs::PermissionsExt, path::Path};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::*;

#[test]
fn a_second_daemon_is_told_who_has_the_directory() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("made/by/open");
    let first = StateDir::open(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);

    let error = StateDir::open(&path).unwrap_err();
    assert!(matches!(error, StateError::InUse { pid: Some(pid), .. } if pid == std::process::id()), "{error:?}");
    assert!(error.to_string().contains(&format!("in use by process {}", std::process::id())), "{error}");

    drop(first);
    StateDir::open(&path).unwrap();
}

#[test]
fn what_is_saved_is_loaded() {
    let root = tempfile::tempdir().unwrap();
    let state = StateDir::open(root.path()).unwrap();
    assert_eq!(state.load::<BTreeMap<String, u32>>("tables.json").unwrap(), None);
    for value in [BTreeMap::from([("a".to_owned(), 1)]), BTreeMap::from([("a".to_owned(), 2), ("b".to_owned(), 3)])] {
        state.save("tables.json", &value).unwrap();
        assert_eq!(state.load("tables.json").unwrap(), Some(value));
    }
    let mut files: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["lock", "tables.json"], "no temporary file is left");
}

#[test]
fn a_damaged_file_is_an_error_and_can_be_replaced() {
    let root = tempfile::tempdir().unwrap();
    let state = StateDir::open(root.path()).unwrap();
    let path = state.file("x.json");
    for content in [&b""[..], b"{", b"{\"a\":", b"[]", b"{\"a\":-1}", b"\xff\xfe", b"{\"a\":1} trailing", &[b'['; 4096]]
    {
        std::fs::write(&path, content).unwrap();
        let result = state.load::<BTreeMap<String, u32>>("x.json");
        assert!(matches!(result, Err(StateError::Damaged { .. })), "{content:?}: {result:?}");
    }
    File::create(&path).unwrap().set_len(MAX_SIZE + 1).unwrap();
    assert!(matches!(state.load::<BTreeMap<String, u32>>("x.json"), Err(StateError::Read { .. })));

    assert!(state.save_or_say("x.json", &BTreeMap::<String, u32>::new()));
    assert_eq!(state.load("x.json").unwrap(), Some(BTreeMap::<String, u32>::new()));

    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(matches!(state.load::<u32>("x.json"), Err(StateError::Read { .. })));
    assert!(matches!(state.save("x.json", &1), Err(StateError::Write { .. })));
}

/// Runs `test` with a small file system of its own, which nobody else sees and which goes with the thread.
fn on_small_disk(test: impl FnOnce(&Path) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can mount");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let path = root.path().to_owned();
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
        test(&path);
    });
    thread.join().unwrap();
}

/// Which files' failure has been said.
fn said(state: &StateDir) -> usize {
    state.failing.lock().unwrap().len()
}

#[test]
fn a_full_disk_keeps_the_old_content() {
    on_small_disk(|path| {
        let state = StateDir::open(path).unwrap();
        assert!(state.save_or_say("x.json", &1));
        std::fs::write(path.join("fill"), [0; 48 << 10]).unwrap();
        let large = vec![0u32; 8192];
        assert!(matches!(state.save("x.json", &large), Err(StateError::Write { .. })));
        for _ in 0..2 {
            assert!(!state.save_or_say("x.json", &large));
            assert_eq!(said(&state), 1);
        }
        assert_eq!(state.load::<u32>("x.json").unwrap(), Some(1));
        std::fs::remove_file(path.join("fill")).unwrap();
        assert!(state.save_or_say("x.json", &large));
        assert_eq!(said(&state), 0);
        assert_eq!(state.load("x.json").unwrap(), Some(large));
    });
}

#[test]
fn a_read_only_disk_can_be_locked_and_read() {
    on_small_disk(|path| {
        let remount = |flags| mount(None::<&str>, path, None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>);
        let state = StateDir::open(path).unwrap();
        state.save("x.json", &1).unwrap();
        drop(state);
        remount(MsFlags::MS_RDONLY).unwrap();

        let state = StateDir::open(path).unwrap();
        assert!(matches!(StateDir::open(path).unwrap_err(), StateError::InUse { .. }));
        assert_eq!(state.load::<u32>("x.json").unwrap(), Some(1));
        assert!(!state.save_or_say("x.json", &2));
        assert_eq!(state.load::<u32>("x.json").unwrap(), Some(1));

        let error = StateDir::open(path.join("new")).unwrap_err();
        assert!(error.to_string().contains("--state-dir"), "{error}");
    });
}

#[test]
fn boot_time_counts_both_ways() {
    let (early, late) = (BootTime(-500), BootTime(1500));
    assert_eq!(late.since(early), Duration::from_secs(2));
    assert_eq!(early.since(late), Duration::ZERO);
    assert_eq!(early.after(Duration::from_secs(2)), late);
    assert_eq!(late.after(Duration::MAX), BootTime(i64::MAX));
    assert_eq!(BootTime(i64::MAX).since(BootTime(i64::MIN)), Duration::from_millis(i64::MAX as u64));
    assert!(BootTime::now() > BootTime(0));
    assert!(boot_id().is_some_and(|id| id.len() == 36));
}
