//! How does memory go from one request to the next?

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use parking_lot::Mutex;

/// Most values of a kind that wait for their next use, about as many as requests are decided at
/// once.
const WAITING_MAX: usize = 64;
/// Values with more memory than that go back to the system.
const VALUE_BYTES_MAX: usize = 1 << 20;

/// Values of a kind that wait for their next use.
#[derive(Debug)]
pub(crate) struct Pool<T> {
    waiting: Mutex<Vec<T>>,
    /// How much memory a value has, in bytes.
    bytes_of: fn(&T) -> usize,
}

impl<T: Default> Pool<T> {
    pub fn new(bytes_of: fn(&T) -> usize) -> Pool<T> {
        Pool { waiting: Mutex::default(), bytes_of }
    }

    /// A value that goes back when it is dropped. It is as its last user left it.
    pub fn get(self: &Arc<Pool<T>>) -> Reused<T> {
        let value = self.waiting.lock().pop().unwrap_or_default();
        Reused { value, pool: Some(Arc::clone(self)) }
    }
}

/// A value that goes back to its pool, if it has one.
pub(crate) struct Reused<T: Default> {
    value: T,
    pool: Option<Arc<Pool<T>>>,
}

impl<T: Default> Default for Reused<T> {
    fn default() -> Reused<T> {
        Reused { value: T::default(), pool: None }
    }
}

impl<T: Default> Drop for Reused<T> {
    fn drop(&mut self) {
        let Some(pool) = &self.pool else { return };
        let value = std::mem::take(&mut self.value);
        let mut waiting = pool.waiting.lock();
        if waiting.len() < WAITING_MAX && (pool.bytes_of)(&value) <= VALUE_BYTES_MAX {
            waiting.push(value);
        }
    }
}

impl<T: Default> Deref for Reused<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: Default> DerefMut for Reused<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T: Default + fmt::Debug> fmt::Debug for Reused<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value.fmt(f)
    }
}
