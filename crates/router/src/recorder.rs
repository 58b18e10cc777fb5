//! How does what the brain hears get into a file without making it wait for the disk?
//!
//! The brain's entries go into a queue that is bounded by bytes; a thread of its own writes them,
//! one JSON object a line. A recording has no holes: a full queue, a full file or a disk that
//! refuses ends it, and its last line, the log and the metrics say so.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use kvroute_core::journal::{self, ENTRY_BYTES_MAX, End, EndReason, Entry, FORMAT, Header};
use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tracing::{error, info};

use crate::config::Record;
use crate::metrics::{Metrics, ReasonLabel};

/// How often the queue is emptied, unless it fills faster.
const WRITE_INTERVAL: Duration = Duration::from_millis(50);
/// Bytes handed to the system at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Kept free at the end of the file for the line that says why it ends.
const END_BYTES_MAX: u64 = 128;

/// How much may be recorded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecorderLimits {
    /// `recording_bytes_max`.
    pub file_bytes_max: u64,
    /// `recording_queue_bytes_max`.
    pub queue_bytes_max: usize,
}

/// What the metrics tell about it.
#[derive(Clone, Debug)]
pub(crate) struct RecorderMetrics {
    /// 1 while it goes on.
    pub active: Gauge,
    /// Written so far.
    pub bytes: Counter,
    /// Ended before the router did, by reason.
    pub cuts: Family<ReasonLabel, Counter>,
}

/// A recording that goes on until it is finished or dropped.
pub(crate) struct Recorder {
    queue: Arc<Queue>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Recorder {
    /// Creates the file, readable by its owner alone, and starts writing.
    ///
    /// # Errors
    /// The file exists or cannot be created.
    pub fn start(
        record: &Record,
        config: &str,
        seed: u64,
        limits: RecorderLimits,
        metrics: &Metrics,
    ) -> io::Result<Recorder> {
        let file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&record.file)?;
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let header = Header {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            seed,
            config: config.to_owned(),
            started_unix_s: since_epoch.map_or(0.0, |d| d.as_secs_f64()),
        };
        let queue = Arc::new(Queue::new(limits.queue_bytes_max));
        let writer = Writer {
            file,
            path: record.file.clone(),
            bytes_max: limits.file_bytes_max,
            written: 0,
            entries: 0,
            chunk: Vec::new(),
            chunk_entries: 0,
            metrics: metrics.recording.clone(),
        };
        let thread = {
            let queue = Arc::clone(&queue);
            let thread = std::thread::Builder::new().name("recorder".into());
            thread.spawn(move || writer.run(&queue, header))?
        };
        info!(file = %record.file.display(), "Recording.");
        Ok(Recorder { queue, thread: Mutex::new(Some(thread)) })
    }

    /// What the brain calls.
    pub fn hook(&self) -> journal::Recorder {
        let queue = Arc::clone(&self.queue);
        Box::new(move |entry| queue.push(entry))
    }

    /// Nothing more is recorded; what waits is still written.
    pub fn close(&self) {
        self.queue.end(EndReason::Complete);
    }

    /// Closes and returns when everything is written.
    pub fn finish(&self) {
        self.close();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            error!("The recording's thread failed; the recording is cut.");
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.close();
    }
}

/// What waits to be written.
struct Queue {
    waiting: Mutex<Waiting>,
    /// There is much to write, or the end has come.
    wake: Condvar,
    bytes_max: usize,
}

#[derive(Default)]
struct Waiting {
    entries: VecDeque<Entry<'static>>,
    /// Of these and of those that are being written.
    bytes: usize,
    ended: Option<EndReason>,
}

impl Queue {
    fn new(bytes_max: usize) -> Queue {
        Queue { waiting: Mutex::default(), wake: Condvar::new(), bytes_max }
    }

    fn push(&self, entry: Entry<'_>) -> ControlFlow<()> {
        let bytes = entry.bytes();
        let mut waiting = self.waiting.lock();
        if waiting.ended.is_some() {
            return ControlFlow::Break(());
        }
        if waiting.bytes + bytes > self.bytes_max {
            waiting.ended = Some(EndReason::QueueFull);
            self.wake.notify_one();
            return ControlFlow::Break(());
        }
        waiting.bytes += bytes;
        waiting.entries.push_back(entry.into_owned());
        // To wake a thread costs a system call; the brain's lock is held meanwhile.
        if waiting.bytes > self.bytes_max / 2 && waiting.bytes - bytes <= self.bytes_max / 2 {
            self.wake.notify_one();
        }
        ControlFlow::Continue(())
    }

    /// Takes no more. The first reason stays.
    fn end(&self, reason: EndReason) {
        self.waiting.lock().ended.get_or_insert(reason);
        self.wake.notify_one();
    }

    /// What has come since, after a while or when it is urgent, with its bytes, and whether
    /// anything follows. `written` is given back.
    fn take(&self, written: usize) -> (VecDeque<Entry<'static>>, usize, Option<EndReason>) {
        let mut waiting = self.waiting.lock();
        waiting.bytes -= written;
        if waiting.ended.is_none() && waiting.bytes <= self.bytes_max / 2 {
            let _ = self.wake.wait_for(&mut waiting, WRITE_INTERVAL);
        }
        (std::mem::take(&mut waiting.entries), waiting.bytes, waiting.ended)
    }
}

/// The end of the file.
struct Writer {
    file: File,
    path: PathBuf,
    bytes_max: u64,
    /// Whole lines in the file.
    written: u64,
    /// Entries in the file.
    entries: u64,
    chunk: Vec<u8>,
    chunk_entries: u64,
    metrics: RecorderMetrics,
}

/// Why nothing more can be written.
type Cut = (EndReason, Option<io::Error>);

impl Writer {
    fn run(mut self, queue: &Queue, header: Header) {
        self.metrics.active.set(1);
        let cut = self.write_all(queue, header);
        let (reason, error) = cut;
        queue.end(reason);
        // What was queued since the file took no more is of no use to anybody.
        drop(queue.take(0));
        self.end(reason, error);
        self.metrics.active.set(0);
    }

    /// Writes until the end, whatever the end is.
    fn write_all(&mut self, queue: &Queue, header: Header) -> Cut {
        if let Err(cut) = self.add(&Entry::Recording(header)) {
            return cut;
        }
        let mut taken = 0;
        loop {
            let (entries, bytes, ended) = queue.take(taken);
            taken = bytes;
            for entry in entries {
                if let Err(cut) = self.add(&entry) {
                    return cut;
                }
            }
            if let Err(cut) = self.flush() {
                return cut;
            }
            if let Some(reason) = ended {
                return (reason, None);
            }
        }
    }

    /// Adds a line, if it fits.
    fn add(&mut self, entry: &Entry<'_>) -> Result<(), Cut> {
        let before = self.chunk.len();
        let encoded = serde_json::to_writer(&mut self.chunk, entry);
        self.chunk.push(b'\n');
        let too_long = self.chunk.len() - before > ENTRY_BYTES_MAX;
        let file_full = self.written + self.chunk.len() as u64 + END_BYTES_MAX > self.bytes_max;
        let reason = match encoded {
            Err(error) => Some((EndReason::DiskError, Some(error.into()))),
            Ok(()) if too_long => Some((EndReason::EntryTooLong, None)),
            Ok(()) if file_full => Some((EndReason::FileFull, None)),
            Ok(()) => None,
        };
        if let Some(cut) = reason {
            self.chunk.truncate(before);
            return Err(self.flush().err().unwrap_or(cut));
        }
        self.chunk_entries += u64::from(!matches!(entry, Entry::Recording(_)));
        if self.chunk.len() >= CHUNK_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Cut> {
        if let Err(error) = self.file.write_all(&self.chunk) {
            // Half a line may have been written; the end must stand on a line of its own.
            self.chunk.clear();
            self.chunk_entries = 0;
            let _ = self.file.set_len(self.written);
            return Err((EndReason::DiskError, Some(error)));
        }
        self.written += self.chunk.len() as u64;
        self.entries += std::mem::take(&mut self.chunk_entries);
        self.metrics.bytes.inc_by(self.chunk.len() as u64);
        self.chunk.clear();
        self.chunk.shrink_to(CHUNK_BYTES);
        Ok(())
    }

    /// Says in the file, in the log and in the metrics why nothing follows.
    fn end(&mut self, reason: EndReason, error: Option<io::Error>) {
        let file = self.path.display();
        if reason != EndReason::Complete {
            let (label, bytes) = (reason.as_str(), self.written);
            self.metrics.cuts.get_or_create(&ReasonLabel { reason: label }).inc();
            let why = error.map_or_else(|| advice(reason).to_owned(), |error| error.to_string());
            error!(%file, reason = label, bytes, "The recording is cut: {why}.");
        }
        let mut line = Vec::new();
        let end = Entry::End(End { reason, entries: self.entries });
        let written = serde_json::to_writer(&mut line, &end).map_err(io::Error::from);
        line.push(b'\n');
        let at = io::SeekFrom::Start(self.written);
        let written = written
            .and_then(|()| io::Seek::seek(&mut self.file, at).map(|_| ()))
            .and_then(|()| self.file.write_all(&line))
            .and_then(|()| self.file.sync_all());
        match written {
            Ok(()) => info!(%file, entries = self.entries, "The recording has ended."),
            Err(error) => error!(%file, %error, "The recording's last line cannot be written."),
        }
    }
}

fn advice(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Complete => "the router stopped",
        EndReason::FileFull => "the file is full; raise kvroute.recording_bytes_max",
        EndReason::QueueFull => {
            "the disk is slower than the traffic; raise kvroute.recording_queue_bytes_max or \
             record to a faster disk"
        }
        EndReason::DiskError => "the disk refused",
        EndReason::EntryTooLong => "one entry is too long; lower kvroute.event_bytes_max",
    }
}

#[cfg(test)]
mod tests {
    use kvroute_core::Time;
    use kvroute_core::journal::Call;

    use super::*;

    fn tick(now: u64) -> Entry<'static> {
        Entry::Call(Call::Tick { now: Time(now) })
    }

    fn header() -> Header {
        Header {
            format: FORMAT,
            version: String::new(),
            seed: 1,
            config: String::new(),
            started_unix_s: 0.0,
        }
    }

    fn writer(file: File, bytes_max: u64) -> Writer {
        Writer {
            file,
            path: "test".into(),
            bytes_max,
            written: 0,
            entries: 0,
            chunk: Vec::new(),
            chunk_entries: 0,
            metrics: Metrics::new(1).recording.clone(),
        }
    }

    fn scratch(name: &str) -> PathBuf {
        let file = std::env::temp_dir().join(format!("kvroute-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&file);
        file
    }

    /// What stands in a file that was written with these limits, after `ticks` entries.
    fn written(name: &str, bytes_max: u64, queue_bytes_max: usize, ticks: u64) -> Vec<String> {
        let path = scratch(name);
        let queue = Queue::new(queue_bytes_max);
        for now in 0..ticks {
            let _ = queue.push(tick(now));
        }
        queue.end(EndReason::Complete);
        writer(File::create(&path).unwrap(), bytes_max).run(&queue, header());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() as u64 <= bytes_max, "{} bytes of {bytes_max}", text.len());
        std::fs::remove_file(path).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn everything_is_written_and_the_end_says_so() {
        let lines = written("complete", 1 << 20, 1 << 20, 100);
        assert_eq!(lines.len(), 102);
        let head = format!("{{\"recording\":{{\"format\":{FORMAT},");
        assert!(lines[0].starts_with(&head), "{}", lines[0]);
        assert_eq!(lines[1], r#"{"call":{"tick":{"now":0}}}"#);
        assert_eq!(lines[101], r#"{"end":{"reason":"complete","entries":100}}"#);
    }

    #[test]
    fn a_full_file_ends_with_the_reason() {
        let lines = written("file-full", 1000, 1 << 20, 100);
        let entries = lines.len() - 2;
        assert!((10..100).contains(&entries), "{lines:?}");
        let end = format!(r#"{{"end":{{"reason":"file_full","entries":{entries}}}}}"#);
        assert_eq!(lines.last(), Some(&end));
    }

    #[test]
    fn a_full_queue_ends_with_the_reason_and_without_a_hole() {
        let room = tick(0).bytes() * 7;
        let lines = written("queue-full", 1 << 20, room, 100);
        assert_eq!(lines.len(), 9);
        assert_eq!(lines[7], r#"{"call":{"tick":{"now":6}}}"#);
        assert_eq!(lines[8], r#"{"end":{"reason":"queue_full","entries":7}}"#);
    }

    #[test]
    fn what_is_written_makes_room_in_the_queue() {
        let queue = Queue::new(tick(0).bytes() * 4);
        let mut taken = 0;
        for now in 0..10 {
            assert!(queue.push(tick(now)).is_continue(), "{now}");
            assert!(queue.push(tick(now)).is_continue(), "{now}");
            let (entries, bytes, ended) = queue.take(taken);
            assert_eq!((entries.len(), ended), (2, None));
            taken = bytes;
        }
        for now in 0..3 {
            let full = queue.push(tick(now)).is_break();
            assert_eq!(full, now == 2, "what is being written counts");
        }
        assert!(queue.push(tick(9)).is_break(), "there is no second beginning");
    }

    #[test]
    fn a_disk_that_refuses_is_counted() {
        let Ok(full) = OpenOptions::new().write(true).open("/dev/full") else {
            println!("skipped: no /dev/full");
            return;
        };
        let queue = Queue::new(1 << 20);
        let _ = queue.push(tick(1));
        let writer = writer(full, 1 << 20);
        let metrics = writer.metrics.clone();
        writer.run(&queue, header());
        let label = ReasonLabel { reason: "disk_error" };
        assert_eq!(metrics.cuts.get_or_create(&label).get(), 1);
        assert_eq!(metrics.active.get(), 0);
        assert!(queue.push(tick(2)).is_break());
    }

    #[test]
    fn an_existing_file_is_left_alone_and_a_new_one_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let file = scratch("private");
        let record = Record { file: file.clone() };
        let limits = RecorderLimits { file_bytes_max: 1 << 20, queue_bytes_max: 1 << 20 };
        let metrics = Metrics::new(1);
        let recorder = Recorder::start(&record, "a: b\n", 7, limits, &metrics).unwrap();
        let again =
            Recorder::start(&record, "a: b\n", 7, limits, &metrics).map(|_| ()).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        let mut hook = recorder.hook();
        assert!(hook(tick(1)).is_continue());
        recorder.finish();
        assert!(hook(tick(2)).is_break());
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.contains("\"seed\":7,\"config\":\"a: b\\n\""), "{text}");
        std::fs::remove_file(file).unwrap();
    }
}
