//! bpf(2), as far as aya does not offer it: maps whose layout is known only when they are
//! looked at, their type information, what a program uses, and another program for a link
//! of any kind.

use std::{
    ffi::CString,
    fs, io, mem,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use aya::util::nr_cpus;
use aya_obj::generated::{
    bpf_attach_type, bpf_btf_info, bpf_cmd, bpf_link_info, bpf_map_info, bpf_map_type,
    bpf_prog_info,
};
use nix::libc;

use super::shape::{Btf, Shape};
use crate::link::Hook;

/// How many programs a device carries at most by tcx (`BPF_MPROG_MAX` of
/// `linux/bpf_mprog.h`).
const TCX_MAX: usize = 64;
/// How many entries are read at once.
const BATCH: usize = 4096;

/// What a pin may be of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    Map,
    Program,
    Link,
}

impl Of {
    /// In words, for people.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Map => "a map",
            Self::Program => "a program",
            Self::Link => "a link",
        }
    }
}

/// Opens a pin, and tells of what it is.
pub(super) fn open(path: &Path) -> io::Result<(OwnedFd, Of)> {
    #[repr(C)]
    struct Get {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut get = Get {
        path: address(path.as_ptr()),
        fd: 0,
        flags: 0,
    };
    let fd = descriptor(bpf_cmd::BPF_OBJ_GET, &mut get)?;
    // The kernel's answers about an object are of another form for each kind, and it does
    // not say of which.
    let target = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let kind = match target.to_string_lossy().trim_start_matches("anon_inode:") {
        "bpf-map" => Of::Map,
        "bpf-prog" => Of::Program,
        "bpf-link" | "bpf_link" => Of::Link,
        other => return Err(io::Error::other(format!("{other} is no BPF object"))),
    };
    Ok((fd, kind))
}

/// What the kernel tells of a program.
pub(super) struct Program {
    pub(super) id: u32,
    pub(super) kind: u32,
    pub(super) name: String,
    /// A hash of its instructions, but for the maps that they name.
    pub(super) tag: [u8; 8],
    /// The maps that it uses.
    pub(super) maps: Vec<u32>,
}

impl Program {
    /// Of a descriptor.
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        // The structure ends in padding, which the kernel would have zero.
        let length = mem::offset_of!(bpf_prog_info, btf_id);
        let mut info: bpf_prog_info = zeroed();
        information_of(fd, &mut info, length)?;
        let mut maps = vec![0_u32; usize::try_from(info.nr_map_ids).unwrap_or(0)];
        let count = info.nr_map_ids;
        // Not as a literal, which says nothing of the bytes behind the last field: the
        // kernel wants zeroes there.
        info = zeroed();
        info.nr_map_ids = count;
        info.map_ids = address(maps.as_mut_ptr());
        information_of(fd, &mut info, length)?;
        maps.truncate(usize::try_from(info.nr_map_ids).unwrap_or(0));
        Ok(Self {
            id: info.id,
            kind: info.type_,
            name: text(&info.name),
            tag: info.tag,
            maps,
        })
    }

    /// Of an id.
    pub(super) fn by_id(id: u32) -> io::Result<Self> {
        Self::of(by_id(bpf_cmd::BPF_PROG_GET_FD_BY_ID, id)?.as_fd())
    }
}

/// What the kernel tells of a link: its kind (`BPF_LINK_TYPE_*`), and the id of its program.
pub(super) fn link(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let mut info: bpf_link_info = zeroed();
    information(fd, &mut info)?;
    Ok((info.type_, info.prog_id))
}

/// Gives a link another program, between two packets.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Update {
        link: u32,
        program: u32,
        flags: u32,
        old: u32,
    }
    let mut update = Update {
        link: number(link),
        program: number(program),
        flags: 0,
        old: 0,
    };
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut update).map(drop)
}

/// The ids of the programs that a device carries by tcx.
pub(super) fn tcx_programs(device: u32, hook: Hook) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Query {
        device: u32,
        hook: u32,
        flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        reserved: u32,
        each_attach_flags: u64,
        links: u64,
        link_attach_flags: u64,
        // The kernel writes it, so there must be room.
        revision: u64,
    }
    let mut ids = [0_u32; TCX_MAX];
    let mut query = Query {
        device,
        hook: match hook {
            Hook::Ingress => bpf_attach_type::BPF_TCX_INGRESS as u32,
            Hook::Egress => bpf_attach_type::BPF_TCX_EGRESS as u32,
        },
        flags: 0,
        attach_flags: 0,
        ids: address(ids.as_mut_ptr()),
        count: u32::try_from(TCX_MAX).unwrap_or(0),
        reserved: 0,
        each_attach_flags: 0,
        links: 0,
        link_attach_flags: 0,
        revision: 0,
    };
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut query)?;
    Ok(ids.into_iter().take(size(query.count)).collect())
}

/// Pins an object.
pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    #[repr(C)]
    struct Pin {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut pin = Pin {
        path: address(path.as_ptr()),
        fd: number(fd),
        flags: 0,
    };
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut pin).map(drop)
}

/// The kernel's number of a pinned map.
pub(super) fn map_id(path: &Path) -> io::Result<u32> {
    match open(path)? {
        (fd, Of::Map) => {
            let mut info: bpf_map_info = zeroed();
            information(fd.as_fd(), &mut info)?;
            Ok(info.id)
        }
        (_, kind) => Err(io::Error::other(format!("it is {}", kind.name()))),
    }
}

/// A map of any layout.
pub(super) struct AnyMap {
    fd: OwnedFd,
    /// The kernel's number of it.
    pub(super) id: u32,
    /// What it is like.
    pub(super) shape: Shape,
}

/// `struct bpf_attr` of the commands for one entry.
#[repr(C)]
struct Element {
    map: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl AnyMap {
    /// The map of a descriptor that is one.
    pub(super) fn of(fd: OwnedFd) -> io::Result<Self> {
        let mut info: bpf_map_info = zeroed();
        information(fd.as_fd(), &mut info)?;
        let bytes = match info.btf_id {
            0 => Vec::new(),
            id => btf(id)?,
        };
        let btf = Btf::parse(&bytes);
        let described = |id| btf.as_ref().and_then(|btf| btf.describe(id));
        Ok(Self {
            fd,
            id: info.id,
            shape: Shape {
                name: text(&info.name),
                kind: info.type_,
                key_size: info.key_size,
                value_size: info.value_size,
                max_entries: info.max_entries,
                flags: info.map_flags,
                key: described(info.btf_key_type_id),
                value: described(info.btf_value_type_id),
            },
        })
    }

    /// The map of this id.
    pub(super) fn by_id(id: u32) -> io::Result<Self> {
        Self::of(by_id(bpf_cmd::BPF_MAP_GET_FD_BY_ID, id)?)
    }

    /// Pins it, in one more place.
    pub(super) fn pin(&self, path: &Path) -> io::Result<()> {
        pin(self.fd.as_fd(), path)
    }

    /// Whether each CPU has values of its own.
    pub(super) const fn is_per_cpu(&self) -> bool {
        self.shape.kind == bpf_map_type::BPF_MAP_TYPE_PERCPU_HASH as u32
            || self.shape.kind == bpf_map_type::BPF_MAP_TYPE_LRU_PERCPU_HASH as u32
            || self.shape.kind == bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32
    }

    /// The distance of two CPUs' values.
    pub(super) fn stride(&self) -> usize {
        size(self.shape.value_size).next_multiple_of(8)
    }

    /// How long an entry's value is, all CPUs' together.
    fn value_len(&self) -> io::Result<usize> {
        if self.is_per_cpu() {
            let cpus = nr_cpus().map_err(|(_, error)| error)?;
            Ok(self.stride() * cpus)
        } else {
            Ok(size(self.shape.value_size))
        }
    }

    /// Hands every entry to `each`. While programs write, an entry may be missed that
    /// was made meanwhile, and none that was there.
    pub(super) fn for_each<E: From<io::Error>>(
        &self,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let kind = self.shape.kind;
        let hashed = kind == bpf_map_type::BPF_MAP_TYPE_HASH as u32
            || kind == bpf_map_type::BPF_MAP_TYPE_LRU_HASH as u32
            || kind == bpf_map_type::BPF_MAP_TYPE_PERCPU_HASH as u32;
        if hashed {
            self.for_each_bucket(each)
        } else {
            let mut key = None;
            while let Some(next) = self.next(key.as_deref())? {
                if let Some(value) = self.get(&next)? {
                    each(&next, &value)?;
                }
                key = Some(next);
            }
            Ok(())
        }
    }

    /// A hash map, bucket by bucket: walked from key to key, it would begin anew when the
    /// key at hand goes.
    fn for_each_bucket<E: From<io::Error>>(
        &self,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        #[repr(C)]
        struct Batch {
            from: u64,
            to: u64,
            keys: u64,
            values: u64,
            count: u32,
            map: u32,
            element_flags: u64,
            flags: u64,
        }
        let (key_len, value_len) = (size(self.shape.key_size), self.value_len()?);
        let mut room = BATCH.min(size(self.shape.max_entries)).max(64);
        let mut position: Option<u32> = None;
        loop {
            let mut keys = vec![0_u8; room * key_len];
            let mut values = vec![0_u8; room * value_len];
            let mut next = 0_u32;
            let mut batch = Batch {
                from: position.as_mut().map_or(0, |from| address(from)),
                to: address(&raw mut next),
                keys: address(keys.as_mut_ptr()),
                values: address(values.as_mut_ptr()),
                count: u32::try_from(room).unwrap_or(u32::MAX),
                map: number(self.fd.as_fd()),
                element_flags: 0,
                flags: 0,
            };
            let done = match bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut batch) {
                Ok(_) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                // A bucket has more than that.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    room *= 2;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let entries = keys.chunks(key_len).zip(values.chunks(value_len));
            for (key, value) in entries.take(size(batch.count)) {
                each(key, value)?;
            }
            if done {
                return Ok(());
            }
            position = Some(next);
        }
    }

    fn next(&self, key: Option<&[u8]>) -> io::Result<Option<Vec<u8>>> {
        let mut next = vec![0_u8; size(self.shape.key_size)];
        let mut element = Element {
            map: number(self.fd.as_fd()),
            key: key.map_or(0, |key| address(key.as_ptr())),
            value: address(next.as_mut_ptr()),
            flags: 0,
        };
        found(bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut element)).map(|found| found.then_some(next))
    }

    /// The value of a key.
    pub(super) fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        check(key, self.shape.key_size)?;
        let mut value = vec![0_u8; self.value_len()?];
        let mut element = Element {
            map: number(self.fd.as_fd()),
            key: address(key.as_ptr()),
            value: address(value.as_mut_ptr()),
            flags: 0,
        };
        found(bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut element)).map(|found| found.then_some(value))
    }

    /// Writes an entry; `flags` are those of the kernel.
    pub(super) fn set(&self, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        check(key, self.shape.key_size)?;
        if value.len() != self.value_len()? {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut element = Element {
            map: number(self.fd.as_fd()),
            key: address(key.as_ptr()),
            value: address(value.as_ptr()),
            flags,
        };
        bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut element).map(drop)
    }
}

/// Nothing is read or written beyond a key.
fn check(key: &[u8], expected: u32) -> io::Result<()> {
    if key.len() == size(expected) {
        Ok(())
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}

/// The type information of this id, as the kernel keeps it.
fn btf(id: u32) -> io::Result<Vec<u8>> {
    let fd = by_id(bpf_cmd::BPF_BTF_GET_FD_BY_ID, id)?;
    let mut info: bpf_btf_info = zeroed();
    information(fd.as_fd(), &mut info)?;
    let mut bytes = vec![0_u8; size(info.btf_size)];
    let mut info = bpf_btf_info {
        btf: address(bytes.as_mut_ptr()),
        btf_size: info.btf_size,
        ..zeroed()
    };
    information(fd.as_fd(), &mut info)?;
    Ok(bytes)
}

fn by_id(command: bpf_cmd, id: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Get {
        id: u32,
        next: u32,
        flags: u32,
    }
    descriptor(
        command,
        &mut Get {
            id,
            next: 0,
            flags: 0,
        },
    )
}

/// Fills `info`, whose pointers and lengths are those of live memory, or zero.
fn information<T: Copy>(fd: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    information_of(fd, info, size_of::<T>())
}

/// As [`information`], of the first bytes alone.
fn information_of<T: Copy>(fd: BorrowedFd<'_>, info: &mut T, length: usize) -> io::Result<()> {
    #[repr(C)]
    struct Info {
        fd: u32,
        len: u32,
        info: u64,
    }
    let mut attributes = Info {
        fd: number(fd),
        len: u32::try_from(length.min(size_of::<T>())).unwrap_or(0),
        info: address(ptr::from_mut(info)),
    };
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes).map(drop)
}

fn descriptor<T>(command: bpf_cmd, attributes: &mut T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The system call. `attributes` begin as those of `command` in `union bpf_attr`; the
/// callers in this file see to it that what they point to lives and is as long as the
/// kernel takes it to be.
fn bpf<T>(command: bpf_cmd, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: as said above; the size is that of the attributes, and the kernel takes what
    // is behind it as zero.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Whether there was such an entry.
fn found(result: io::Result<libc::c_long>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// One of the kernel's structures, empty.
fn zeroed<T: Copy>() -> T {
    // SAFETY: used for C structures and unions of integers only, which may be zero.
    unsafe { mem::zeroed() }
}

/// An address as the kernel takes it.
fn address<T>(memory: *const T) -> u64 {
    memory.expose_provenance() as u64
}

/// A descriptor as the kernel takes it; one that is open is not negative.
fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// The machine has no less than 32 bits.
const fn size(number: u32) -> usize {
    number as usize
}

/// A name as the kernel has it.
fn text(name: &[libc::c_char; 16]) -> String {
    name.iter()
        .take_while(|byte| **byte != 0)
        .map(|byte| char::from(byte.cast_unsigned()))
        .collect()
}
