//! From one layout of the maps to another, while packets flow.
//!
//! 1. The new maps are made beside the old ones, and what the old ones have is written into
//!    them, field by field ([`shape`]). A map of the same shape is not copied:
//!    it is pinned in the new place as well, and old and new programs share it.
//! 2. The new programs are loaded for the new maps. From then on the new layout is in use
//!    (`unfinished` is gone).
//! 3. Every hook gets its new program, one after the other.
//! 4. What old programs have learned meanwhile is copied once more.
//! 5. The old pins are removed.
//!
//! Maps of this version's own layout are made anew in the same way when the node's limits
//! have changed ([`Root::put_aside`]).
//!
//! Killed before the second step's end, it begins anew; after that, the next call goes on.
//! Nobody else changes anything while it lasts: the lock of the pins is held alone, and
//! everybody who takes that lock comes by here first ([`settle`]).

use std::{collections::HashMap, ops::Range, time::Duration};

use aya_obj::generated::bpf_map_type;
use bpf_bridge_common::layout::{Endpoint, MacKey, PORT_CLAIMED, PORT_ROUTED, Port};
use nix::time::{ClockId, clock_gettime};

use super::{
    ANY, EXIST, Error, NOEXIST,
    bpf::AnyMap,
    get,
    hooks::{self, Moved},
    nat::{self, Part, Translators},
    object::{self, Switch},
    pins::{self, Other, Root},
    set,
    shape::{self, Conversion, Misfit, Shape, Type},
    table,
};
use crate::lock::Mode;

/// What was carried over.
#[derive(Debug)]
pub struct Carried {
    /// From which layout; `None` if the maps were made anew with other limits.
    pub from: Option<String>,
    /// All of it was done by this call.
    pub whole: bool,
    /// How many entries were written anew.
    pub entries: usize,
    /// What has its new programs.
    pub moved: Moved,
}

/// The map whose words programs set bits in.
const BITS: &str = "USED";

/// Maps that have keys of others in their values.
const INDEXES: [(&str, &[&str]); 2] = [
    ("PLACES", &["FLOWS", "REPLIES", "FRAGMENTS", "HELD"]),
    ("LEARNED_PLACES", &["LEARNED"]),
];

/// Carries an older layout over if one is pinned; what was begun and not finished is
/// finished.
///
/// # Errors
///
/// [`Error::Newer`], [`Error::Carry`], or the lock cannot be taken.
pub(super) fn settle() -> Result<Option<Carried>, Error> {
    match pins::other()? {
        None => return Ok(None),
        Some(Other::Newer(found)) => return Err(Error::Newer { found }),
        Some(Other::Older(_)) => {}
    }
    let _alone = pins::lock_any(Mode::Exclusive)?;
    let mut carried = None;
    loop {
        match pins::other()? {
            None => return Ok(carried),
            Some(Other::Newer(found)) => return Err(Error::Newer { found }),
            Some(Other::Older(old)) => {
                carried = from(&old)?.or(carried);
            }
        }
    }
}

/// Carries `old` over. The lock of the pins is held alone.
pub(super) fn from(old: &Root) -> Result<Option<Carried>, Error> {
    if !old.is_loaded() {
        // What a load that was killed has left, or an end that was.
        old.remove()?;
        return Ok(None);
    }
    let failed = |state, source| Error::Carry {
        from: old.name(),
        source: Box::new(source),
        state,
    };
    let own = Root::own();
    let mut entries = 0;
    let begun = now();
    let whole = !own.is_complete();
    if whole {
        let made = own
            .remove()
            .and_then(|()| own.begin())
            .and_then(|()| make(old, &own))
            .and_then(|made| own.complete().map(|()| made));
        entries = made.map_err(|error| {
            // Nobody can use what is aside.
            let _ = own.remove().and_then(|()| old.put_back());
            failed("nothing was changed", error)
        })?;
    }
    // One that was killed has begun at some time before.
    let since = if whole { begun } else { 0 };
    let moved = move_over(old, &own, since, &mut entries)
        .map_err(|error| failed("it is not finished, and the next call goes on", error))?;
    Ok(Some(Carried {
        from: (!old.is_put_aside()).then(|| old.name()),
        whole,
        entries,
        moved,
    }))
}

/// What is left to do when the new maps are in use.
fn move_over(old: &Root, own: &Root, since: u64, entries: &mut usize) -> Result<Moved, Error> {
    if Part::Sockets.is_loaded_in(old) {
        Translators::load(&[Part::Sockets], &[])?.install(Some(old))?;
    }
    let moved = hooks::hand_over_all(Some(old))?;
    *entries += catch_up(old, own, since)?;
    old.remove()?;
    Ok(moved)
}

/// Whether this version's maps have other limits than the node's settings say.
pub(super) fn has_other_limits(own: &Root) -> Result<bool, Error> {
    let expected = expected()?;
    let mut other = false;
    for name in maps() {
        let path = own.map(name);
        object::require_own(&path, &expected[name])?;
        if let Some(map) = object::open_map(&path, name)? {
            other |= map.shape.max_entries != expected[name].max_entries;
        }
    }
    Ok(other)
}

/// What all maps should be like.
fn expected() -> Result<HashMap<String, Shape>, Error> {
    let mut expected = object::expected(object::OBJECT)?;
    expected.extend(object::expected(object::NAT)?);
    Ok(expected)
}

/// The maps that are carried over.
fn maps() -> impl Iterator<Item = &'static str> {
    object::SHARED
        .into_iter()
        .filter(|name| *name != object::LOG)
        .chain(nat::MAPS)
}

/// Makes the new maps and programs; says how many entries were written.
fn make(old: &Root, own: &Root) -> Result<usize, Error> {
    let expected = expected()?;
    pins::create_maps()?;
    for name in maps() {
        if let Some(map) = object::open_map(&old.map(name), name)?
            && map.shape == expected[name]
            && still_indexes(old, &expected, name)?
        {
            pins::pin(&own.map(name), |path| map.pin(path))?;
        }
    }
    let switches: Vec<Switch> = old.levels().map(Switch::load).collect::<Result<_, _>>()?;
    let translators = Translators::load_as_in(old, Some(Part::Sockets))?;
    let mut entries = 0;
    for name in maps() {
        if let Some((from, to)) = pair(old, own, name)?
            && still_indexes(old, &expected, name)?
        {
            entries += copy(name, &from, &to, 0, ANY)?;
        }
    }
    for switch in switches {
        switch.install()?;
    }
    translators.map_or(Ok(()), |translators| translators.install(None))?;
    Ok(entries)
}

/// Whether what a map has of others' keys, as mere words, still are such keys. If not, it
/// begins empty: it says which entries count as whose share.
fn still_indexes(old: &Root, expected: &HashMap<String, Shape>, name: &str) -> Result<bool, Error> {
    let Some((_, of)) = INDEXES.iter().find(|(index, _)| *index == name) else {
        return Ok(true);
    };
    for &name in *of {
        if let Some(map) = object::open_map(&old.map(name), name)?
            && map.shape.key != expected[name].key
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// An old map and the new one, if they are not one and the same.
fn pair(old: &Root, own: &Root, name: &'static str) -> Result<Option<(AnyMap, AnyMap)>, Error> {
    let from = object::open_map(&old.map(name), name)?;
    let to = object::open_map(&own.map(name), name)?;
    Ok(from.zip(to).filter(|(from, to)| from.id != to.id))
}

/// Writes the entries of one map into another, but for those that were last used before
/// `since`.
fn copy(
    name: &'static str,
    from: &AnyMap,
    to: &AnyMap,
    since: u64,
    flags: u64,
) -> Result<usize, Error> {
    let entry = Entry::new(from, to).map_err(|why| misfit(name, &why))?;
    let mut count = 0;
    let mut write = |key: &[u8], value: &[u8]| {
        let (key, value) = entry
            .convert(key, value)
            .map_err(|why| misfit(name, &why))?;
        match to.set(&key, &value, flags) {
            Ok(()) => count += 1,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                let why = format!(
                    "writing an entry: {error} (it can have {} entries)",
                    to.shape.max_entries
                );
                return Err(misfit(name, &why));
            }
        }
        Ok(())
    };
    let Some(seen) = seen(from) else {
        from.for_each(write)?;
        return Ok(count);
    };
    // What has to be forgotten is what was written first.
    let mut all = Vec::new();
    from.for_each(|key, value| {
        let seen = shape::number(&value[seen.clone()]);
        // 0 is of those that are never used again, but hold their place.
        if seen >= since || seen == 0 {
            all.push((seen, key.to_vec(), value.to_vec()));
        }
        Ok::<_, Error>(())
    })?;
    all.sort_by_key(|(seen, ..)| *seen);
    for (_, key, value) in all {
        write(&key, &value)?;
    }
    Ok(count)
}

/// The programs' time (`bpf_ktime_get_ns`).
fn now() -> u64 {
    // The clock is there, and does not go back behind the boot.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .ok()
        .and_then(|now| u64::try_from(Duration::from(now).as_nanos()).ok())
        .unwrap_or(0)
}

/// Where the entries of a map that forgets say when they were used.
fn seen(map: &AnyMap) -> Option<Range<usize>> {
    let forgets = map.shape.kind == bpf_map_type::BPF_MAP_TYPE_LRU_HASH as u32;
    map.shape.value.as_ref().filter(|_| forgets)?.field("seen")
}

fn misfit(map: &'static str, why: &dyn std::fmt::Display) -> Error {
    Error::Misfit {
        map: map.to_owned(),
        why: why.to_string(),
    }
}

/// How the entries of one map become those of another.
struct Entry {
    key: Conversion,
    value: Conversion,
    /// The distances of two CPUs' values.
    strides: Option<(usize, usize)>,
}

impl Entry {
    fn new(from: &AnyMap, to: &AnyMap) -> Result<Self, Misfit> {
        let conversion = |from: &Option<Type>, to: &Option<Type>| match (from, to) {
            (Some(from), Some(to)) => Conversion::new(from, to),
            _ => Err(Misfit::Untyped),
        };
        let strides = from.is_per_cpu().then(|| (from.stride(), to.stride()));
        Ok(Self {
            key: conversion(&from.shape.key, &to.shape.key)?,
            value: conversion(&from.shape.value, &to.shape.value)?,
            strides,
        })
    }

    fn convert(&self, key: &[u8], value: &[u8]) -> Result<(Vec<u8>, Vec<u8>), Misfit> {
        let key = self.key.apply(key)?;
        let Some((from, to)) = self.strides else {
            return Ok((key, self.value.apply(value)?));
        };
        let mut all = Vec::with_capacity(value.len() / from * to);
        for (cpu, value) in value.chunks(from).enumerate() {
            all.extend(self.value.apply(value)?);
            all.resize((cpu + 1) * to, 0);
        }
        Ok((key, all))
    }
}

/// Copies what old programs have written after the first copy: all of it is memory that the
/// new ones may have refreshed since.
fn catch_up(old: &Root, own: &Root, since: u64) -> Result<usize, Error> {
    let mut entries = 0;
    for name in maps() {
        let Some((from, to)) = pair(old, own, name)? else {
            continue;
        };
        if INDEXES.iter().any(|(index, _)| *index == name) {
            // What is without a place has none of the share.
            continue;
        }
        if from.shape.kind == bpf_map_type::BPF_MAP_TYPE_LRU_HASH as u32 {
            entries += copy(name, &from, &to, since, NOEXIST)?;
        } else if name == BITS {
            join(name, &from, &to)?;
        } else if name == "PORTS" {
            note_routed(&from, &to)?;
        }
    }
    Ok(entries)
}

/// Sets the bits of one array in another.
fn join(name: &'static str, from: &AnyMap, to: &AnyMap) -> Result<(), Error> {
    let entry = Entry::new(from, to).map_err(|why| misfit(name, &why))?;
    from.for_each(|key, value| {
        let (key, mut bits) = entry
            .convert(key, value)
            .map_err(|why| misfit(name, &why))?;
        let there = to.get(&key)?.unwrap_or_default();
        for (byte, there) in bits.iter_mut().zip(&there) {
            *byte |= there;
        }
        if bits != there {
            to.set(&key, &bits, ANY)?;
        }
        Ok(())
    })
}

/// Notes what programs write into what is the plugin's: that the host's stack has brought a
/// port a flow of its own segment.
fn note_routed(from: &AnyMap, to: &AnyMap) -> Result<(), Error> {
    let entry = Entry::new(from, to).map_err(|why| misfit("PORTS", &why))?;
    let mut ports = table::<u32, Port>("PORTS")?;
    let mut endpoints = table::<MacKey, Endpoint>("ENDPOINTS")?;
    from.for_each(|key, value| {
        let (key, value) = entry
            .convert(key, value)
            .map_err(|why| misfit("PORTS", &why))?;
        let (Ok(&ifindex), Ok(&old)) = (
            bytemuck::try_from_bytes::<[u8; 4]>(&key),
            bytemuck::try_from_bytes::<[u8; size_of::<Port>()]>(&value),
        ) else {
            return Err(misfit("PORTS", &"its entries have another length"));
        };
        let (ifindex, old) = (u32::from_ne_bytes(ifindex), bytemuck::cast::<_, Port>(old));
        if old.flags & (PORT_ROUTED | PORT_CLAIMED) == 0 {
            return Ok(());
        }
        if let Some(mut port) = get(&ports, "PORTS", ifindex)? {
            port.flags |= old.flags & (PORT_ROUTED | PORT_CLAIMED);
            set(&mut ports, "PORTS", ifindex, port, EXIST)?;
        }
        let key = MacKey::new(old.segment, old.mac);
        if let Some(mut endpoint) = get(&endpoints, "ENDPOINTS", key)?
            && endpoint.port == ifindex
        {
            endpoint.flags |= old.flags & PORT_ROUTED;
            set(&mut endpoints, "ENDPOINTS", key, endpoint, EXIST)?;
        }
        Ok(())
    })
}
