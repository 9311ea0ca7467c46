//! How many instructions of the eBPF programs a frame takes.
//!
//! The kernel does not count them, so the bytecode that a build of the plugin carries is
//! interpreted here, with the node's own maps. What helpers do inside the kernel does not
//! count, and neither does what the kernel's compiler adds or leaves out: this is the
//! length of the way, not its time.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{self, ErrorKind},
    mem,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{maps::MapData, programs::loaded_programs, util::nr_cpus};
use aya_obj::{
    Object,
    generated::{bpf_insn, bpf_map_type},
};
use nix::libc;

/// `e_machine` of an object with eBPF programs.
const EM_BPF: u16 = 247;
/// How an ELF file of 64 bits in little endian begins.
const ELF: [u8; 7] = *b"\x7fELF\x02\x01\x01";

/// More than the kernel's verifier lets a program take.
const MAX_INSTRUCTIONS: u64 = 1_000_000;
/// How many programs may go on with another, one after the other.
const MAX_TAIL_CALLS: usize = 33;
const STACK_LEN: usize = 512;

/// Where `struct __sk_buff` of `linux/bpf.h` has the frame's length, its device, its
/// beginning and its end.
pub(super) const SKB_LEN: usize = 192;
const SKB_FRAME_LEN: usize = 0;
pub(super) const SKB_IFINDEX: usize = 40;
const SKB_DATA: usize = 76;
const SKB_DATA_END: usize = 80;

/// The programs of a build of the plugin.
pub(super) struct Bytecode {
    programs: HashMap<String, Vec<bpf_insn>>,
    maps: Vec<Definition>,
}

/// A map as its object has it.
struct Definition {
    name: String,
    kind: u32,
    key: usize,
    value: usize,
    /// What a map of constants and variables begins with.
    data: Vec<u8>,
}

/// What became of a frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) verdict: u32,
    /// Executed, in all programs that it went through.
    pub(super) instructions: u64,
}

impl Bytecode {
    /// Reads the objects that the plugin `binary` has inside, with logging off.
    pub(super) fn of(binary: &Path) -> Result<Self> {
        let file = fs::read(binary).with_context(|| format!("reading {}", binary.display()))?;
        let mut found = Self {
            programs: HashMap::new(),
            maps: Vec::new(),
        };
        for at in 0..file.len() {
            let object = &file[at..];
            if object.starts_with(&ELF) && object.get(18..20) == Some(&EM_BPF.to_le_bytes()) {
                let place = || format!("reading the object at byte {at} of {}", binary.display());
                found.read(object).with_context(place)?;
            }
        }
        ensure!(
            !found.programs.is_empty(),
            "{} has no eBPF programs inside",
            binary.display()
        );
        Ok(found)
    }

    fn read(&mut self, object: &[u8]) -> Result<()> {
        let mut object = Object::parse(object)?;
        object.patch_map_data(HashMap::from([("AYA_LOG_LEVEL", (&[0][..], false))]))?;
        let sections: HashSet<usize> = object.functions.keys().map(|key| key.0).collect();
        // In place of its descriptor a map has its number here.
        let maps: Vec<_> = mem::take(&mut object.maps).into_iter().collect();
        let first = self.maps.len();
        let numbered = maps.iter().zip(first..);
        object.relocate_maps(
            numbered.map(|((name, map), number)| (name.as_str(), number as RawFd, map)),
            &sections,
        )?;
        object.relocate_calls(&sections)?;
        self.maps
            .extend(maps.into_iter().map(|(name, map)| Definition {
                name,
                kind: map.map_type(),
                key: map.key_size() as usize,
                value: map.value_size() as usize,
                data: map.data().to_vec(),
            }));
        for (name, program) in &object.programs {
            let function = object.functions.get(&program.function_key());
            let function = function.with_context(|| format!("the program {name} is nowhere"))?;
            self.programs
                .insert(name.clone(), function.instructions.clone());
        }
        Ok(())
    }

    /// What becomes of `frame` if `program` is given it as received on the device
    /// `ifindex`. The maps are those that are pinned at `pins`; nothing is written to
    /// them.
    pub(super) fn run(
        &self,
        program: &str,
        ifindex: u32,
        frame: &[u8],
        pins: &[PathBuf],
    ) -> Result<Outcome> {
        let pinned = |name: &str| {
            let path = pins
                .iter()
                .find(|pin| pin.file_name().is_some_and(|file| file == name))?;
            Some(MapData::from_pin(path).with_context(|| format!("opening {}", path.display())))
        };
        let maps = self.maps.iter();
        let maps = maps
            .map(|map| pinned(&map.name).transpose())
            .collect::<Result<_>>()?;
        let mut machine = Machine::new(self, maps, ifindex, frame);
        let verdict = machine
            .run(program)
            .with_context(|| format!("interpreting {program}"))?;
        Ok(Outcome {
            verdict,
            instructions: machine.executed,
        })
    }
}

/// Memory: pieces that are each a megabyte from the next, so that an address fits into
/// the 32 bits that the frame's have in its context.
#[derive(Default)]
struct Memory(Vec<Vec<u8>>);

const PIECE_BITS: u32 = 20;

impl Memory {
    /// Adds a piece, and returns its address.
    fn add(&mut self, bytes: Vec<u8>) -> u64 {
        self.0.push(bytes);
        (self.0.len() as u64) << PIECE_BITS
    }

    fn at(&mut self, address: u64, len: usize) -> Result<&mut [u8]> {
        let piece = (address >> PIECE_BITS).checked_sub(1);
        let start = (address & ((1 << PIECE_BITS) - 1)) as usize;
        piece
            .and_then(|piece| self.0.get_mut(usize::try_from(piece).ok()?))
            .and_then(|piece| piece.get_mut(start..start + len))
            .with_context(|| format!("no {len} bytes at address {address:#x}"))
    }

    fn load(&mut self, address: u64, len: usize) -> Result<u64> {
        let mut word = [0; 8];
        word[..len].copy_from_slice(self.at(address, len)?);
        Ok(u64::from_le_bytes(word))
    }

    fn store(&mut self, address: u64, len: usize, value: u64) -> Result<()> {
        self.at(address, len)?
            .copy_from_slice(&value.to_le_bytes()[..len]);
        Ok(())
    }
}

/// What a program runs on.
struct Machine<'a> {
    code: &'a Bytecode,
    maps: Vec<Option<MapData>>,
    memory: Memory,
    /// The address of each map, and of what was looked up in them.
    handles: Vec<u64>,
    values: HashMap<(usize, Vec<u8>), Option<u64>>,
    context: u64,
    registers: [u64; 11],
    executed: u64,
}

/// What a call of a helper did.
enum Called {
    Returned(u64),
    /// The program goes on with another.
    Program(String),
}

impl<'a> Machine<'a> {
    fn new(code: &'a Bytecode, maps: Vec<Option<MapData>>, ifindex: u32, frame: &[u8]) -> Self {
        let mut memory = Memory::default();
        let data = memory.add(frame.to_vec());
        let mut context = vec![0; SKB_LEN];
        let mut put = |at: usize, value: u64| {
            context[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
        };
        put(SKB_FRAME_LEN, frame.len() as u64);
        put(SKB_IFINDEX, ifindex.into());
        put(SKB_DATA, data);
        put(SKB_DATA_END, data + frame.len() as u64);
        // The ethertype as it is in the frame.
        context[16..18].copy_from_slice(&frame[12..14]);
        let context = memory.add(context);
        let handles = code
            .maps
            .iter()
            .map(|map| memory.add(map.data.clone()))
            .collect();
        Self {
            code,
            maps,
            memory,
            handles,
            values: HashMap::new(),
            context,
            registers: [0; 11],
            executed: 0,
        }
    }

    fn run(&mut self, program: &str) -> Result<u32> {
        let mut program = program.to_owned();
        for _ in 0..=MAX_TAIL_CALLS {
            match self.run_one(&program)? {
                Called::Returned(verdict) => return Ok(verdict as u32),
                Called::Program(next) => program = next,
            }
        }
        bail!("programs call each other without an end")
    }

    fn run_one(&mut self, program: &str) -> Result<Called> {
        let code = self.code;
        let code = code.programs.get(program);
        let code = code.with_context(|| format!("the build has no program {program}"))?;
        self.registers[1] = self.context;
        self.registers[10] = self.memory.add(vec![0; STACK_LEN]) + STACK_LEN as u64;
        // Where to go on in the caller, with the registers that it keeps.
        let mut callers: Vec<(usize, [u64; 5])> = Vec::new();
        let mut at = 0;
        loop {
            let place = || format!("instruction {at} of {program}");
            let instruction = code.get(at).with_context(place)?;
            self.executed += 1;
            ensure!(self.executed <= MAX_INSTRUCTIONS, "there is no end");
            let immediate = instruction.imm;
            let source = usize::from(instruction.src_reg());
            match instruction.code {
                // A constant of 64 bits, a map, or a place in one of constants.
                0x18 => {
                    let high = code.get(at + 1).with_context(place)?.imm;
                    let low = immediate as u32;
                    let map = || self.handles.get(low as usize).copied().with_context(place);
                    self.registers[usize::from(instruction.dst_reg())] = match source {
                        0 => u64::from(high as u32) << 32 | u64::from(low),
                        1 => map()?,
                        2 => map()? + u64::from(high as u32),
                        _ => bail!("{}: source {source} of a constant", place()),
                    };
                    at += 1;
                }
                // Calls of helpers and of the program's own functions, and the way back.
                0x85 if source == 0 => match self.call(immediate).with_context(place)? {
                    Called::Returned(value) => self.registers[0] = value,
                    other => return Ok(other),
                },
                0x85 if source == 1 => {
                    let [.., a, b, c, d, stack] = self.registers;
                    callers.push((at, [a, b, c, d, stack]));
                    self.registers[10] = self.memory.add(vec![0; STACK_LEN]) + STACK_LEN as u64;
                    at = at.wrapping_add_signed(immediate as isize);
                }
                0x95 => match callers.pop() {
                    None => return Ok(Called::Returned(self.registers[0])),
                    Some((from, kept)) => {
                        self.registers[6..].copy_from_slice(&kept);
                        at = from;
                    }
                },
                // A jump with the width of the immediate.
                0x06 => at = at.wrapping_add_signed(immediate as isize),
                _ => {
                    if self.step(instruction).with_context(place)? {
                        at = at.wrapping_add_signed(instruction.off.into());
                    }
                }
            }
            at = at.wrapping_add(1);
        }
    }

    /// Executes one of all the other instructions; says whether it jumps.
    fn step(&mut self, instruction: &bpf_insn) -> Result<bool> {
        let code = instruction.code;
        let (to, from) = (
            usize::from(instruction.dst_reg()),
            usize::from(instruction.src_reg()),
        );
        let offset = i64::from(instruction.off);
        let len = match code & 0x18 {
            0x00 => 4,
            0x08 => 2,
            0x10 => 1,
            _ => 8,
        };
        let operand = if code & 0x08 == 0 {
            i64::from(instruction.imm) as u64
        } else {
            self.registers[from]
        };
        let registers = &mut self.registers;
        match (code & 0x07, code & 0xf0) {
            // LDX and STX of memory, and ST.
            (1, _) if code & 0xe0 == 0x60 => {
                let address = registers[from].wrapping_add_signed(offset);
                registers[to] = self.memory.load(address, len)?;
            }
            (2 | 3, _) if code & 0xe0 == 0x60 => {
                let address = registers[to].wrapping_add_signed(offset);
                let value = match code & 0x07 {
                    2 => i64::from(instruction.imm) as u64,
                    _ => registers[from],
                };
                self.memory.store(address, len, value)?;
            }
            // Byte order.
            (4, 0xd0) => {
                let bits = instruction.imm as u32;
                ensure!(matches!(bits, 16 | 32 | 64), "a byte order of {bits} bits");
                let low = registers[to] << (64 - bits);
                registers[to] = if code & 0x08 == 0 {
                    low >> (64 - bits)
                } else {
                    low.swap_bytes()
                };
            }
            (class @ (4 | 7), operation) => {
                ensure!(
                    offset == 0,
                    "an operation of another kind: {code:#x}, {offset}"
                );
                registers[to] = if class == 7 {
                    compute(operation, registers[to], operand)?
                } else {
                    compute_half(operation, registers[to] as u32, operand as u32)?.into()
                };
            }
            (5, 0x00) => return Ok(true),
            (5, operation) => return compare(operation, registers[to] as i64, operand as i64),
            (6, operation) => {
                // Extended with their sign both words compare as they do by themselves.
                let [a, b] = [registers[to], operand].map(|word| i64::from(word as i32));
                return compare(operation, a, b);
            }
            _ => bail!("an instruction of another kind: {code:#x}"),
        }
        Ok(false)
    }

    /// Calls a helper of `linux/bpf.h`.
    fn call(&mut self, helper: i32) -> Result<Called> {
        let [_, a, b, c, d, ..] = self.registers;
        Ok(Called::Returned(match helper {
            // bpf_map_lookup_elem
            1 => self.look_up(a, b)?.unwrap_or(0),
            // bpf_map_update_elem: seen by this frame, and not by the node.
            2 => {
                let number = self.number(a)?;
                let map = &self.code.maps[number];
                let key = self.memory.at(b, map.key)?.to_vec();
                let value = self.memory.at(c, map.value)?.to_vec();
                let address = self.memory.add(value);
                self.values.insert((number, key), Some(address));
                0
            }
            // bpf_ktime_get_ns, and bpf_ktime_get_coarse_ns, which is the same to a tick
            5 | 160 => uptime()?.as_nanos() as u64,
            // bpf_tail_call
            12 => {
                let slot = (c as u32).to_ne_bytes();
                match self.number(b).and_then(|map| self.read(map, &slot))? {
                    Some(id) => return Ok(Called::Program(name(&id)?)),
                    None => 0,
                }
            }
            // bpf_redirect and bpf_redirect_peer: TC_ACT_REDIRECT
            23 | 155 => 7,
            // bpf_skb_load_bytes
            26 => {
                let len = d as usize;
                let data = self.memory.load(self.context + SKB_DATA as u64, 4)?;
                let bytes = self.memory.at(data + b, len).map(|bytes| bytes.to_vec());
                match bytes {
                    Ok(bytes) => {
                        self.memory.at(c, len)?.copy_from_slice(&bytes);
                        0
                    }
                    Err(_) => i64::from(-libc::EFAULT) as u64,
                }
            }
            // bpf_skb_change_type
            32 => 0,
            _ => bail!("helper {helper} is not known here"),
        }))
    }

    /// The number of the map with this address.
    fn number(&self, handle: u64) -> Result<usize> {
        let number = self.handles.iter().position(|known| *known == handle);
        number.with_context(|| format!("no map at address {handle:#x}"))
    }

    /// The address of a value of a map, for this CPU.
    fn look_up(&mut self, handle: u64, key: u64) -> Result<Option<u64>> {
        let number = self.number(handle)?;
        let key = self.memory.at(key, self.code.maps[number].key)?.to_vec();
        if let Some(known) = self.values.get(&(number, key.clone())) {
            return Ok(*known);
        }
        let value = self.read(number, &key)?;
        let address = value.map(|value| self.memory.add(value));
        self.values.insert((number, key), address);
        Ok(address)
    }

    /// The value of a map; one copy of it if each CPU has its own.
    fn read(&self, number: usize, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let map = &self.code.maps[number];
        let is = |kind: bpf_map_type| map.kind == kind as u32;
        let copies = if is(bpf_map_type::BPF_MAP_TYPE_PERCPU_HASH)
            || is(bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY)
            || is(bpf_map_type::BPF_MAP_TYPE_LRU_PERCPU_HASH)
        {
            nr_cpus().map_err(|(_, error)| error)?
        } else {
            1
        };
        let Some(pinned) = &self.maps[number] else {
            // What a program needs for itself while it runs.
            ensure!(
                is(bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY),
                "the map {} is not pinned",
                map.name
            );
            return Ok(Some(vec![0; map.value]));
        };
        let mut value = vec![0; map.value.next_multiple_of(8) * copies];
        let found = read_map(pinned.fd().as_fd(), key, &mut value)
            .with_context(|| format!("reading the map {}", map.name))?;
        value.truncate(map.value);
        Ok(found.then_some(value))
    }
}

fn compute(operation: u8, a: u64, b: u64) -> Result<u64> {
    Ok(match operation {
        0x00 => a.wrapping_add(b),
        0x10 => a.wrapping_sub(b),
        0x20 => a.wrapping_mul(b),
        0x30 => a.checked_div(b).unwrap_or(0),
        0x40 => a | b,
        0x50 => a & b,
        0x60 => a.wrapping_shl(b as u32),
        0x70 => a.wrapping_shr(b as u32),
        0x80 => a.wrapping_neg(),
        0x90 => a.checked_rem(b).unwrap_or(a),
        0xa0 => a ^ b,
        0xb0 => b,
        0xc0 => (a as i64).wrapping_shr(b as u32) as u64,
        _ => bail!("an operation of another kind: {operation:#x}"),
    })
}

/// The same of the lower halves. Only shifts by their own width tell them from wider ones.
fn compute_half(operation: u8, a: u32, b: u32) -> Result<u32> {
    Ok(match operation {
        0x60 => a.wrapping_shl(b),
        0x70 => a.wrapping_shr(b),
        0xc0 => (a as i32).wrapping_shr(b) as u32,
        _ => compute(operation, a.into(), b.into())? as u32,
    })
}

fn compare(operation: u8, a: i64, b: i64) -> Result<bool> {
    let (x, y) = (a as u64, b as u64);
    Ok(match operation {
        0x10 => x == y,
        0x20 => x > y,
        0x30 => x >= y,
        0x40 => x & y != 0,
        0x50 => x != y,
        0x60 => a > b,
        0x70 => a >= b,
        0xa0 => x < y,
        0xb0 => x <= y,
        0xc0 => a < b,
        0xd0 => a <= b,
        _ => bail!("a jump of another kind: {operation:#x}"),
    })
}

/// The clock of `bpf_ktime_get_ns`.
fn uptime() -> Result<Duration> {
    Ok(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?.into())
}

/// The name of the program whose id is what a program array has.
fn name(id: &[u8]) -> Result<String> {
    let id = u32::from_ne_bytes(id.try_into()?);
    let program = loaded_programs()
        .filter_map(Result::ok)
        .find(|program| program.id() == id);
    let program = program.with_context(|| format!("no program has the id {id}"))?;
    let name = program.name_as_str().context("a program without a name")?;
    Ok(name.to_owned())
}

/// Reads the value of `key` in a map of any shape; says whether there is one.
fn read_map(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    /// `BPF_MAP_LOOKUP_ELEM` of `linux/bpf.h`, and its arguments.
    const LOOK_UP: libc::c_int = 1;
    #[repr(C)]
    struct Arguments {
        map: u32,
        reserved: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let arguments = Arguments {
        map: map.as_raw_fd() as u32,
        reserved: 0,
        key: key.as_ptr() as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: key and value are at least as long as the map's, which are those of the
    // object that it was made from.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            LOOK_UP,
            &raw const arguments,
            size_of::<Arguments>(),
        )
    };
    if result == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.kind() == ErrorKind::NotFound => Ok(false),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instruction(code: u8, to: u8, from: u8, off: i16, imm: i32) -> bpf_insn {
        bpf_insn {
            code,
            _bitfield_align_1: [],
            _bitfield_1: bpf_insn::new_bitfield_1(to, from),
            off,
            imm,
        }
    }

    /// Interprets one program of `code`, which has a map of its own.
    fn run(code: &[(u8, u8, u8, i16, i32)]) -> Result<Outcome> {
        let code = code.iter();
        let code = code.map(|&(code, to, from, off, imm)| instruction(code, to, from, off, imm));
        let code = Bytecode {
            programs: HashMap::from([("program".to_owned(), code.collect())]),
            maps: vec![Definition {
                name: "OWN".to_owned(),
                kind: bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32,
                key: 4,
                value: 8,
                data: Vec::new(),
            }],
        };
        code.run("program", 5, &(0..20).collect::<Vec<u8>>(), &[])
    }

    fn done(verdict: u32, instructions: u64) -> Outcome {
        Outcome {
            verdict,
            instructions,
        }
    }

    const EXIT: (u8, u8, u8, i16, i32) = (0x95, 0, 0, 0, 0);

    #[test]
    fn an_instruction_counts_as_often_as_it_is_executed() {
        // r0 = 0; r2 = 5; do { r0 += r2; r2 -= 1 } while r2 != 0
        let sum = [
            (0xb7, 0, 0, 0, 0),
            (0xb7, 2, 0, 0, 5),
            (0x0f, 0, 2, 0, 0),
            (0x17, 2, 0, 0, 1),
            (0x55, 2, 0, -3, 0),
            EXIT,
        ];
        assert_eq!(run(&sum).unwrap(), done(15, 2 + 5 * 3 + 1));
        // A wide constant is one instruction, whatever room it takes.
        let wide = [(0x18, 0, 0, 0, -2), (0, 0, 0, 0, 1), EXIT];
        assert_eq!(run(&wide).unwrap(), done(u32::MAX - 1, 2));
        // What is jumped over does not count.
        let over = [
            (0xb7, 0, 0, 0, 3),
            (0x05, 0, 0, 1, 0),
            (0xb7, 0, 0, 0, 4),
            EXIT,
        ];
        assert_eq!(run(&over).unwrap(), done(3, 3));
        assert!(run(&[(0x05, 0, 0, -1, 0)]).is_err(), "no end");
        assert!(run(&over[..1]).is_err(), "nothing after the last one");
    }

    #[test]
    fn the_context_leads_to_the_frame() {
        let byte = |at| run(&[(0x61, 2, 1, SKB_DATA as i16, 0), (0x71, 0, 2, at, 0), EXIT]);
        assert_eq!(byte(13).unwrap(), done(13, 3));
        assert_eq!(byte(19).unwrap(), done(19, 3));
        assert!(byte(20).is_err(), "behind its end");
        assert!(byte(-1).is_err(), "before its beginning");
        let field = |at: usize| run(&[(0x61, 0, 1, at as i16, 0), EXIT]).unwrap().verdict;
        assert_eq!((field(SKB_FRAME_LEN), field(SKB_IFINDEX)), (20, 5));
        assert_eq!(field(SKB_DATA_END) - field(SKB_DATA), 20);
        // bpf_skb_load_bytes of two bytes, onto the stack.
        let load = |at| {
            run(&[
                (0xb7, 2, 0, 0, at),
                (0xbf, 3, 10, 0, 0),
                (0x07, 3, 0, 0, -8),
                (0xb7, 4, 0, 0, 2),
                (0x85, 0, 0, 0, 26),
                (0x55, 0, 0, 1, 0),
                (0x69, 0, 10, -8, 0),
                EXIT,
            ])
        };
        assert_eq!(load(18).unwrap(), done(0x1312, 8));
        assert_eq!(load(19).unwrap(), done(-libc::EFAULT as u32, 7));
    }

    #[test]
    fn a_function_has_a_stack_of_its_own_and_leaves_its_callers_registers() {
        let calls = [
            (0xb7, 6, 0, 0, 7),
            (0x7b, 10, 6, -8, 0),
            (0x85, 0, 1, 0, 4),
            (0x0f, 0, 6, 0, 0),
            (0x79, 2, 10, -8, 0),
            (0x0f, 0, 2, 0, 0),
            EXIT,
            // The function.
            (0xb7, 6, 0, 0, 100),
            (0x7b, 10, 6, -8, 0),
            (0xb7, 0, 0, 0, 1),
            EXIT,
        ];
        assert_eq!(run(&calls).unwrap(), done(1 + 7 + 7, 11));
    }

    #[test]
    fn what_is_written_to_a_value_is_there_when_it_is_looked_up_again() {
        let look_up = |then: &[(u8, u8, u8, i16, i32)]| {
            let mut code = vec![
                (0x62, 10, 0, -4, 0),
                (0x18, 1, 1, 0, 0),
                (0, 0, 0, 0, 0),
                (0xbf, 2, 10, 0, 0),
                (0x07, 2, 0, 0, -4),
                (0x85, 0, 0, 0, 1),
            ];
            code.extend(then);
            code
        };
        let write = look_up(&[(0x62, 0, 0, 4, 9)]);
        let read = look_up(&[(0x61, 0, 0, 4, 0), EXIT]);
        assert_eq!(run(&read).unwrap(), done(0, 7));
        assert_eq!(run(&[write, read].concat()).unwrap(), done(9, 6 + 7));
    }

    #[test]
    fn a_helper_that_is_not_known_is_no_guess() {
        let error = run(&[(0x85, 0, 0, 0, 9), EXIT]).unwrap_err();
        assert!(format!("{error:#}").contains("helper 9"), "{error:#}");
    }

    #[test]
    fn arithmetic_is_that_of_the_specification() {
        const HIGH: u64 = 1 << 63;
        // RFC 9669 §4.1: the operation, its operands, the result, and that of the lower
        // halves.
        for (operation, a, b, wide, half) in [
            (0x00, u64::MAX, 2, 1, 1),
            (0x10, 1, 2, u64::MAX, u32::MAX),
            (0x20, HIGH, 2, 0, 0),
            (0x30, 1 << 33, 2, 1 << 32, 0),
            (0x30, 7, 0, 0, 0),
            (0x40, HIGH, 1, HIGH | 1, 1),
            (0x50, 0xf0, 0x3c, 0x30, 0x30),
            (0x60, 1, 33, 1 << 33, 2),
            (0x70, HIGH, 33, 1 << 30, 0),
            (0x80, 1, 0, u64::MAX, u32::MAX),
            (0x90, 7, 0, 7, 7),
            (0x90, 7, 4, 3, 3),
            (0xa0, 6, 3, 5, 5),
            (0xb0, 6, 3, 3, 3),
            (
                0xc0,
                HIGH | 1 << 31,
                31,
                HIGH >> 31 | 0xffff_fffe_0000_0000 | 1,
                u32::MAX,
            ),
        ] {
            let of = (a, b);
            assert_eq!(
                compute(operation, a, b).unwrap(),
                wide,
                "{operation:#x} {of:?}"
            );
            let result = compute_half(operation, a as u32, b as u32).unwrap();
            assert_eq!(result, half, "{operation:#x} {of:?}, lower halves");
        }
        assert!(compute(0xe0, 0, 0).is_err());
        // The other byte order, and this one, of 16 bits.
        for (code, result) in [(0xdc, 0x3412), (0xd4, 0x1234)] {
            let swap = [(0xb7, 0, 0, 0, 0x5a_1234), (code, 0, 0, 0, 16), EXIT];
            assert_eq!(run(&swap).unwrap().verdict, result);
        }
    }

    #[test]
    fn comparisons_know_their_signs() {
        for (operation, of_minus_one_and_one) in [
            (0x10, false),
            (0x20, true),
            (0x30, true),
            (0x40, true),
            (0x50, true),
            (0x60, false),
            (0x70, false),
            (0xa0, false),
            (0xb0, false),
            (0xc0, true),
            (0xd0, true),
        ] {
            // The same of all 64 bits, and of the lower halves below other upper ones.
            for (class, upper) in [(5, -1), (6, 77)] {
                let jump = [
                    (0x18, 2, 0, 0, -1),
                    (0, 0, 0, 0, upper),
                    (0xb7, 0, 0, 0, 1),
                    (operation | class, 2, 0, 1, 1),
                    (0xb7, 0, 0, 0, 0),
                    EXIT,
                ];
                let jumped = run(&jump).unwrap().verdict == 1;
                assert_eq!(
                    jumped, of_minus_one_and_one,
                    "{operation:#x} of class {class}"
                );
            }
        }
        for operation in [0x10, 0x30, 0x70, 0xb0, 0xd0] {
            assert!(compare(operation, 3, 3).unwrap(), "{operation:#x}");
        }
    }
}
