//! The map that prefixes are looked up in, written through memory that the programs read at the same time, and the map that
//! says which one is published.
//!
//! aya makes neither maps of a size known only now, nor maps of maps, nor mappings: these are the system calls.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    ptr::NonNull,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use aya::maps::MapData;
use tracing::warn;
use tunroute_common::{maps::names, trie::Words};

use super::{DatapathError, Result, map_error};
use crate::{
    policy::fast::FastOp,
    prefixes::index::{Content, Image, Memory, change},
    prefixes::map::PrefixMap,
};

/// Of `enum bpf_cmd` in `include/uapi/linux/bpf.h`.
const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
/// Of `enum bpf_map_type`.
const TYPE_ARRAY: u32 = 2;
const TYPE_ARRAY_OF_MAPS: u32 = 12;
/// `BPF_F_MMAPABLE`
const MMAPABLE: u32 = 1 << 10;

/// The published map's name below the pin directory. It is pinned since reaching it through the other map takes
/// `CAP_SYS_ADMIN`.
pub(super) const WORDS: &str = "WORDS";
/// Maximum number of operations that are applied to the published map; for more a new one is made.
const CHANGED_IN_PLACE: usize = 256;

/// The part of `union bpf_attr` that belongs to `BPF_MAP_CREATE`.
#[repr(C)]
#[derive(Default)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
}

/// The part of `union bpf_attr` that belongs to operations on elements.
#[repr(C)]
struct Element {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// A system call, whose attributes are as large as their type.
///
/// # Safety
///
/// The attributes must be those of the command, and what they point to must live.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the caller's promise; the kernel reads the given number of bytes.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes a map of one element.
fn create(name: &str, map_type: u32, value_size: u32, map_flags: u32, inner_map_fd: u32) -> Result<MapData> {
    let mut attributes =
        Create { map_type, key_size: 4, value_size, max_entries: 1, map_flags, inner_map_fd, ..Create::default() };
    // The last byte stays 0.
    for (to, from) in attributes.name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: the attributes of this command, without pointers.
    let fd = unsafe { bpf(MAP_CREATE, &attributes) }.map_err(|source| DatapathError::Words { source })?;
    let fd = libc::c_int::try_from(fd).map_err(|error| DatapathError::Words { source: io::Error::other(error) })?;
    // SAFETY: a new descriptor without another owner.
    MapData::from_fd(unsafe { OwnedFd::from_raw_fd(fd) }).map_err(map_error(names::INDEX))
}

fn raw_fd(map: &MapData) -> u32 {
    map.fd().as_fd().as_raw_fd().cast_unsigned()
}

/// A map whose one element is words, in memory.
pub struct WordMap {
    map: MapData,
    memory: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the memory belongs to the value and is reached by atomic operations only.
unsafe impl Send for WordMap {}
// SAFETY: as above.
unsafe impl Sync for WordMap {}

impl WordMap {
    /// A new map of this many words, all 0.
    fn create(count: u64) -> Result<Self> {
        let value_size = count.checked_mul(8).and_then(|size| u32::try_from(size).ok());
        let value_size =
            value_size.ok_or_else(|| DatapathError::Words { source: io::ErrorKind::OutOfMemory.into() })?;
        Self::new(create(WORDS, TYPE_ARRAY, value_size, MMAPABLE, 0)?)
    }

    /// The published one of those pinned in a directory.
    ///
    /// # Errors
    ///
    /// If there is none, or it cannot be mapped.
    pub fn pinned(directory: &Path) -> Result<Self> {
        Self::new(MapData::from_pin(directory.join(WORDS)).map_err(map_error(names::INDEX))?)
    }

    fn new(map: MapData) -> Result<Self> {
        let count = map.info().map_err(map_error(names::INDEX))?.value_size() as usize / size_of::<u64>();
        // SAFETY: a new mapping of a map's whole element.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * size_of::<u64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        let memory = (memory != libc::MAP_FAILED).then_some(memory.cast()).and_then(NonNull::new);
        let memory = memory.ok_or_else(|| DatapathError::Words { source: io::Error::last_os_error() })?;
        Ok(Self { map, memory, count })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped for as long as this value lives, and valid as atomic words for any content.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.count) }
    }
}

impl Words for WordMap {
    fn word(&self, index: u64) -> u64 {
        let word = usize::try_from(index).ok().and_then(|index| self.words().get(index));
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }
}

impl Memory for WordMap {
    fn length(&self) -> u64 {
        self.count as u64
    }

    fn write(&self, index: u64, word: u64) {
        if let Some(place) = usize::try_from(index).ok().and_then(|index| self.words().get(index)) {
            place.store(word, Ordering::Release);
        }
    }
}

impl Drop for WordMap {
    fn drop(&mut self) {
        // SAFETY: what was mapped; nothing borrows from it any more.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.count * size_of::<u64>()) };
    }
}

/// The published words, for lookups.
#[derive(Clone)]
pub(super) struct Published(Arc<RwLock<WordMap>>);

impl Published {
    pub(super) fn words(&self) -> RwLockReadGuard<'_, WordMap> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Both maps.
pub struct Index {
    /// The array of one map.
    index: MapData,
    published: Published,
    directory: PathBuf,
    /// A change was begun and has failed: the next one makes a new map.
    damaged: bool,
}

impl Index {
    /// The maps pinned in the directory; new ones if there are none or they are too small.
    ///
    /// # Errors
    ///
    /// If the kernel has no such maps or no memory for them, or they cannot be pinned.
    pub fn open(directory: &Path, words: u64) -> Result<Self> {
        if let Some((index, published)) = Self::pinned(directory)
            && published.length() >= words
        {
            return Ok(Self::new(index, published, directory));
        }
        for name in [names::INDEX, WORDS] {
            let _gone = fs::remove_file(directory.join(name));
        }
        let published = WordMap::create(words)?;
        // Written empty, so that a lookup finds nothing, and a record of nothing.
        let empty = Image::compile(Content { sources: &PrefixMap::default(), exempt: &BTreeSet::new() });
        empty.write(&published).map_err(DatapathError::Full)?;
        let index = create(names::INDEX, TYPE_ARRAY_OF_MAPS, 4, 0, raw_fd(&published.map))?;
        let this = Self::new(index, published, directory);
        this.publish(&this.published.words())?;
        this.pin_missing()?;
        Ok(this)
    }

    fn new(index: MapData, published: WordMap, directory: &Path) -> Self {
        let published = Published(Arc::new(RwLock::new(published)));
        Self { index, published, directory: directory.to_owned(), damaged: false }
    }

    /// Both, if the pinned map is the published one: a daemon may have died in between.
    fn pinned(directory: &Path) -> Option<(MapData, WordMap)> {
        let index = MapData::from_pin(directory.join(names::INDEX)).ok()?;
        let words = WordMap::pinned(directory).ok()?;
        let mut id = 0u32;
        // SAFETY: the attributes of this command; key and value live until it returns. From user space the value is the
        // inner map's number (`bpf_fd_array_map_lookup_elem()` in `kernel/bpf/arraymap.c`).
        unsafe { bpf(MAP_LOOKUP_ELEM, &element(&index, (&raw mut id).cast())) }.ok()?;
        (words.map.info().ok()?.id() == id).then_some((index, words))
    }

    pub(super) fn published(&self) -> Published {
        self.published.clone()
    }

    /// Number of words of the map.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.published.words().length()
    }

    /// Pins what is not pinned.
    pub(super) fn pin_missing(&self) -> Result<()> {
        let published = self.published.words();
        for (map, name) in [(&self.index, names::INDEX), (&published.map, WORDS)] {
            let path = self.directory.join(name);
            if !path.exists() {
                map.pin(&path).map_err(|source| DatapathError::Pin { path, source })?;
            }
        }
        Ok(())
    }

    /// Applies operations on prefixes; `content` is the state afterwards.
    ///
    /// # Errors
    ///
    /// As [`Self::renew`].
    pub fn update(&mut self, content: Content<'_>, operations: &[&FastOp]) -> Result<()> {
        if !self.damaged
            && operations.len() <= CHANGED_IN_PLACE
            && change(&*self.published.words(), content, operations)
        {
            return Ok(());
        }
        self.renew(content)
    }

    /// Publishes a new map. One that cannot be pinned is in force all the same.
    ///
    /// # Errors
    ///
    /// If there is no room for so much, or the kernel refuses another map: then the one before stays.
    pub fn renew(&mut self, content: Content<'_>) -> Result<()> {
        self.damaged = true;
        let length = self.length();
        // The kernel clears the memory of a new map.
        let (image, words) = rayon::join(|| Image::compile(content), || WordMap::create(length));
        let words = words?;
        image.write(&words).map_err(DatapathError::Full)?;
        self.publish(&words)?;
        let _gone = fs::remove_file(self.directory.join(WORDS));
        *self.published.0.write().unwrap_or_else(PoisonError::into_inner) = words;
        self.damaged = false;
        // The programs already read the new map. `Datapath::restore_pins` pins it later.
        if let Err(error) = self.pin_missing() {
            warn!("{error}; the fast path goes on, but a restart of tunroute will have a gap until it is pinned");
        }
        Ok(())
    }

    /// Waits until no program runs any more that has read maps before this call: the kernel does so whenever a map in a map
    /// is replaced, be it by itself.
    pub(super) fn wait_for_programs(&self) -> Result<()> {
        self.publish(&self.published.words())
    }

    /// Makes words the published ones. The kernel waits until no program looks at those before any more
    /// (`maybe_wait_bpf_programs()` in `kernel/bpf/syscall.c`), which go away then if nothing else holds them.
    fn publish(&self, words: &WordMap) -> Result<()> {
        let fd = raw_fd(&words.map);
        // SAFETY: the attributes of this command; key and value live until it returns.
        unsafe { bpf(MAP_UPDATE_ELEM, &element(&self.index, (&raw const fd).cast_mut().cast())) }
            .map_err(|source| DatapathError::Words { source })?;
        Ok(())
    }
}

/// The one element of a map.
fn element(map: &MapData, value: *mut libc::c_void) -> Element {
    const FIRST: &u32 = &0;
    Element { map_fd: raw_fd(map), padding: 0, key: std::ptr::from_ref(FIRST) as u64, value: value as u64, flags: 0 }
}
